"""Compiler texts as graphs: each value with what it was computed from, what reads it, and where it was written.

Only what carries floating point or its bits is understood; every other instruction is an opaque value with its
operands. Control flow is a merge of values (`phi`), and memory, shared memory too, ends a path.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Where an operation was written: file:line:column of it, and of the call that inlined it.
Place = tuple[str, str]
NOWHERE: Place = ("", "")


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


def origins(node: Node) -> set[Node]:
    """The values that node is merged of or a part of: itself where it is neither."""
    found, seen, todo = set(), set(), [node]
    while todo:
        each = todo.pop()
        if each.op in ("phi", "part", "pack"):
            todo += [arg for arg in each.args if isinstance(arg, Node) and arg not in seen]
            seen |= {arg for arg in each.args if isinstance(arg, Node)}
        else:
            found.add(each)
    return found
