"""Compiler texts as graphs: each value with what it was computed from, what reads it, and where it was written.

Only what carries floating point or its bits is understood; every other instruction is an opaque value with its
operands. Control flow is a merge of values (`phi`), and memory, shared memory too, ends a path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

# Where an operation was written: file:line:column of it, and of the call that inlined it.
Place = tuple[str, str]
NOWHERE: Place = ("", "")
MERGES = ("phi", "part", "pack")  # operations that hand a value on, whole or a part of it


@dataclass(eq=False)
class Node:
    """A value, or an operation without one. Constants of machine code are ints: 32 bits, unsigned."""

    op: str
    args: list[Node | int] = field(default_factory=list)
    text: str = ""  # TTIR: attributes and types; machine code: the instruction
    place: Place = NOWHERE
    users: list[Node] = field(default_factory=list)


def link(nodes: list[Node]) -> list[Node]:
    """The same nodes, each with its users."""
    for node in nodes:
        for arg in {id(arg): arg for arg in node.args if isinstance(arg, Node)}.values():
            arg.users.append(node)
    return nodes


def place_of(spots: list[str]) -> Place:
    """The first two of a chain of calls, innermost first; line 0 is the compiler's word for nowhere."""
    if not spots or ":0:" in spots[0]:
        return NOWHERE
    return spots[0], spots[1] if len(spots) > 1 else ""


def spot(place: Place) -> str:
    """File and line of a place."""
    return f"at {place[0].rpartition(':')[0]}" if place[0] else "its place lost"


def reached(starts: Iterable[Node | int], step: Callable[[Node], Iterable[Node | int]]) -> set[Node]:
    """These nodes, and every one to which step leads from one of them; constants are none."""
    todo = [each for each in starts if isinstance(each, Node)]
    found = set(todo)
    while todo:
        new = {each for each in step(todo.pop()) if isinstance(each, Node)} - found
        found |= new
        todo += new
    return found


def origins(node: Node | int, passed: tuple[str, ...] = MERGES) -> set[Node]:
    """The values that node is merged of or a part of, or made of by these operations: itself where it is not."""
    found = reached([node], lambda each: each.args if each.op in passed else ())
    return {each for each in found if each.op not in passed}
