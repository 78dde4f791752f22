"""TTIR in words, for the cells of a row: its values, roundings and products, and what could not be followed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from castpoint.harness.audit.flow import LOADS, NOT_FOLLOWED, Flow
from castpoint.harness.audit.graph import Node, reached, spot
from castpoint.harness.audit.ttir import pointer_name, types_of

TITLES = {
    "offset": "weight_offset (1 + w)",
    "remainder": "the remainder of tf32",
    "": "a value outside the chain",
    "product": "a product",
}


def titled(role: str) -> str:
    return TITLES.get(role, role)


def listed(words: Iterable[str]) -> str:
    """The words once each, with how often where it is more, in the order in which they come."""
    return ", ".join(word if count == 1 else f"{count} x {word}" for word, count in Counter(words).items())


def described(flow: Flow) -> list[str]:
    """What is rounded, how, and what reads it then; one phrase for each rounding of TTIR."""
    phrases = []
    for rounding, edges in flow.rounded.items():
        source = edges[0].source
        what = titled(edges[0].role) if edges[0].role else f"unclassified {source.op}"
        what += f" {pointer_name(source)}" if source.op in LOADS else ""
        to = ", ".join(dict.fromkeys(titled(e.sink_role) if e.sink_role else e.sink.op for e in edges))
        phrases.append(f"{rounding.kind} of {what} for {to}, {spot(max(rounding.places))}")
    return phrases


def not_followed(flow: Flow) -> list[str]:
    """Operations of TTIR that this audit cannot see through, workspace that is read and never written, and roundings
    that a loop carries around."""
    operations = {id(node.args): node for node in flow.nodes}  # one for each, however many results it has
    found = Counter(node.op for node in operations.values() if NOT_FOLLOWED.fullmatch(node.op) and not counts(node))
    words = [op if count == 1 else f"{count} x {op}" for op, count in found.items()]
    words += [
        "a tt.dot that adds up in fp16" for node in flow.nodes if node.op == "tt.dot" and types_of(node)[1] == "fp16"
    ]
    loaded = dict.fromkeys(pointer_name(node) for node in flow.nodes if node.op in LOADS)
    for pointer in loaded:
        names = [name for name in pointer.split(" or ") if name in flow.stored]
        if names and (len(pointer.split(" or ")) > 1 or not flow.stored[pointer]):
            words.append(f"a load of {pointer} that no store matches")
    carried = [
        e
        for e in flow.edges
        if e.roundings and e.source in (s for s, _ in flow.paths(e.roundings[-1].node)) and e.sink is e.source
    ]
    return words + [f"a rounding that a loop carries around, of {e.role or e.source.op}" for e in carried]


def counts(node: Node) -> bool:
    """Whether this is an atomic that adds an integer constant, of whose result no float is made: a counter."""
    if not node.op.startswith("tt.atomic_rmw") or types_of(node)[1][0] != "i" or not isinstance(node.args[1], int):
        return False
    made = reached([node], lambda each: each.users)
    return not any(types_of(each)[1] in ("f16", "fp16", "bf16", "f32", "f64") for each in made)


def dot_precisions(flow: Flow) -> list[str]:
    """Operand precision of every matrix product: bf16, fp16, or for fp32 operands ieee, tf32 and so on."""
    found = []
    for node in flow.nodes:
        if node.op.startswith("tt.dot"):
            operand, precision = types_of(node)[0], re.search(r"inputPrecision = (\w+)", node.text)
            found.append((precision[1] if precision else "ieee") if operand == "f32" else operand)
    return found
