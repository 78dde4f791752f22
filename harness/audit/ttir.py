"""TTIR as a graph: it is in static single assignment form as it stands, so each of its names is a value."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import PurePath

from castpoint.harness.audit.graph import NOWHERE, Node, Place, link, place_of
from castpoint.harness.audit.instructions import FORMATS

_LOC = re.compile(r" loc\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)")
_OPERATION = re.compile(r'(?:(%[^=]+) = )?"?([\w.]+)"?(.*)')
_NAME = r"%[\w.]+(?:#\d+)?"
_CONSTANT = re.compile(r"(?:dense<)?(-?\d+)>? : (?:tensor<[\dx]+)?i(?:16|32)\b")
CONVERSIONS = ("arith.truncf", "arith.extf", "tt.fp_to_fp", "arith.sitofp", "arith.uitofp")
# Triton's fp8e4nv, fp8e5, fp8e4b15 and, on AMD, fp8e4b8 and fp8e5b16.
EIGHT_BITS = {"f8E4M3FN": "e4m3", "f8E5M2": "e5m2", "f8E4M3B11FNUZ": "e4m3b11fnuz"}
EIGHT_BITS |= {"f8E4M3FNUZ": "e4m3fnuz", "f8E5M2FNUZ": "e5m2fnuz"}
_BITS = {"andi": "and", "ori": "or", "addi": "iadd", "shrui": "shr", "shli": "shl", "select": "select", "cmpi": "cmp"}


def ttir_graph(text: str) -> list[Node]:
    """Every value and operation of TTIR, in order.

    Names are MLIR's (`arith.mulf`), but integer operations have the words of machine code (`and`, `iadd`) and integer
    constants are ints. Arguments of functions are `arg` with name and type as text; loop-carried values and results
    of branches are `phi`. The text of a reduction ends with the operations that combine two values. Arguments of
    other regions (`scf.while`) are `region_arg`, of which nothing is known.
    """
    places, nodes = _ttir_places(text), []
    # Of each open region: the values by their names, and the phis that its yield feeds, or its reduction.
    regions: list[tuple[dict[str, Node | int], list[Node]]] = [({}, [])]

    def value(name: str) -> Node | int:
        return next((scope[name] for scope, _ in reversed(regions) if name in scope), Node("unknown", text=name))

    def define(name: str, node: Node) -> Node:
        regions[-1][0][name] = node
        nodes.append(node)
        return node

    for line in text.splitlines():
        locs = _LOC.findall(line)
        line = _LOC.sub("", line).strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("}"):
            _, owners = regions.pop()
            if owners and owners[0].op in ("tt.reduce", "tt.scan"):  # their types and place stand at the end
                owners[0].text += line.lstrip("})")
                owners[0].place = places.get(locs[-1], NOWHERE) if locs else NOWHERE
            if line.endswith("{"):  # else, do
                regions.append(({}, owners))
            continue
        if line.startswith(("module", "tt.func", "^")):
            if not line.startswith("^"):
                regions.append(({}, []))
            for name, type_ in re.findall(r"(%\w+): ([^,{)]+)", line):
                define(name, Node("region_arg" if line[0] == "^" else "arg", text=f"{name[1:]} {type_.strip()}"))
            continue
        scope, owners = regions[-1]
        left, op, rest = _OPERATION.match(line).groups()
        names = _names(left or "")
        place = places.get(locs[-1], NOWHERE) if locs else NOWHERE
        args = [value(each) for each in re.findall(_NAME, re.split(r" : |iter_args|->", rest)[0])]
        if op == "scf.yield":
            for phi, arg in zip(owners, args, strict=False):
                phi.args.append(arg)
            continue
        if op == "arith.constant" and (number := _CONSTANT.match(rest.strip())):
            scope[names[0]] = int(number[1]) & 0xFFFFFFFF
            continue
        op = _BITS.get(op.removeprefix("arith."), op)
        if owners and owners[0].op in ("tt.reduce", "tt.scan"):
            owners[0].text += f" {op}"
        merges = op in ("scf.for", "scf.if") and bool(names)
        results = [Node("phi" if merges else op, [] if merges else args, rest, place) for _ in names or [""]]
        for name, node in zip(names or [""], results, strict=True):
            define(name, node)
        if line.endswith("{"):
            regions.append(({}, results if merges or op in ("tt.reduce", "tt.scan") else []))
            _open_loop(op, rest, results, value, define, regions[-1][0])
    return link(nodes)


def _names(left: str) -> list[str]:
    """The names that an operation gives its results: `%a, %b:2` are three."""
    found = re.findall(r"(%[\w.]+)(?::(\d+))?", left)
    return [each for name, count in found for each in ([f"{name}#{i}" for i in range(int(count))] if count else [name])]


def _open_loop(
    op: str, rest: str, results: list[Node], value: Callable[[str], Node | int], define: Callable[[str, Node], Node],
    scope: dict[str, Node | int],
) -> None:  # fmt: skip
    """Names inside a loop. A result of scf.for is its carried value too, whose first operand comes from before."""
    carried = re.findall(rf"(%\w+) = ({_NAME})", rest)
    if op == "scf.for":
        define(carried.pop(0)[0], Node("counter"))
        for (inner, init), phi in zip(carried, results, strict=False):
            phi.args.append(value(init))
            scope[inner] = phi
    else:
        for inner, _ in carried:
            define(inner, Node("region_arg", text=inner))


def _ttir_places(text: str) -> dict[str, Place]:
    """Place of each location that TTIR names."""
    named = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.M))

    def chain(loc: str) -> list[str]:
        if call := re.fullmatch(r"callsite\((.+) at (.+)\)", loc):
            return [*chain(call[1]), *chain(call[2])]
        if spot := re.fullmatch(r'"([^"]*)":(\d+):(\d+)', loc):
            return [f"{PurePath(spot[1]).name}:{spot[2]}:{spot[3]}"]
        if label := re.fullmatch(r'"[^"]*"\((.+)\)', loc):
            return chain(label[1])
        return chain(named[loc]) if loc in named else [""]

    return {name: place_of(chain(loc)) for name, loc in named.items()}


def types_of(node: Node) -> tuple[str, str]:
    """Element types of the first operand and of the result, in TTIR's words but for fp16 and e4m3, e5m2 and so on."""
    found = re.findall(r"(?:\b|(?<=x))(bf16|f16|f32|f64|f8\w+|i\d+)\b", node.text.rpartition(" : ")[2]) or ["?"]
    first, last = (re.sub(r"^f16", "fp16", EIGHT_BITS.get(each, each)) for each in (found[0], found[-1]))
    return first, last


def converted(node: Node) -> tuple[str, str] | None:
    """What a conversion to a float makes what of, in words of instructions.FORMATS; None for any other operation."""
    if node.op not in CONVERSIONS:
        return None
    before, after = (re.sub(r"^f(?=\d\d$)", "fp", each) for each in types_of(node))
    before = re.sub(r"^i(?!1$)", "u" if "uitofp" in node.op else "s", before)
    return (before, after) if before in FORMATS and after in FORMATS else None


def pointer_name(node: Node) -> str:
    """The argument behind a load's or a store's pointer; `a or b` where branches choose between two."""
    found, seen, todo = [], set(), [node.args[0]]
    while todo:
        each = todo.pop(0)
        if each in seen:
            continue
        seen.add(each)
        if isinstance(each, Node) and each.op in ("phi", "select"):
            todo += each.args[1:] if each.op == "select" else each.args
        elif isinstance(each, Node) and each.op != "arg" and each.args:
            todo.append(each.args[0])
        else:
            found.append(each.text.split()[0] if isinstance(each, Node) and each.op == "arg" else "?")
    return " or ".join(dict.fromkeys(found))
