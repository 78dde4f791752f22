"""The audit of PTX alone, from whatever compiler: what each of its functions rounds, where, and to what.

There is no TTIR to hold it to, so that no line is red. A value is named by the instruction that computes it.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from castpoint.harness.audit.assembly import ptx_graph
from castpoint.harness.audit.graph import MERGES, NOWHERE, Node, origins, spot
from castpoint.harness.audit.instructions import is_unknown, opcode
from castpoint.harness.audit.roundings import MATRIX_RESULT, Rounding, is_fused, machine_roundings
from castpoint.harness.audit.words import listed
from castpoint.harness.compiled.compile import MATRIX_INSTRUCTION
from castpoint.harness.runs.errors import UserError

NEWEST = (9, 4)  # PTX ISA: what Triton 3.9 writes
FUNCTION = re.compile(r"\.(?:entry|func)\b(?:\s*\([^)]*\))?\s*([\w$]+)\s*(?:\([^)]*\))?[^{};]*\{", re.S)
TITLES = {
    "fmul": "a product", "fadd": "a sum", "fsub": "a difference", "fdiv": "a quotient", "fma": "a multiply-add",
    "fsqrt": "a root", "frsqrt": "a reciprocal root",
}  # fmt: skip
OPAQUE = re.compile(r"(call|brx|tex|tld4|surf|suld|sured|\S*texture)\b")


def audit_ptx(path: Path) -> list[dict[str, Any]]:
    """What every kernel and function of a file of PTX rounds, one row each, in the words of audit_foreign's rows.

    target        with the version of the PTX ISA
    machine       how many values a thread rounds to each kind, all copies of loops included
    roundings     of each place what is rounded, and how many; without a line table a place is a line of the file
    fused         multiply-adds, of which nothing here says whether the source has them apart
    matrix        matrix instructions
    not_followed  calls, and conversions and narrow arithmetic that are not known here

    Raises UserError with one sentence where there is no such file, no PTX in it, or a newer ISA than is known here.
    """
    text = read_ptx(path)
    version = re.search(r"^\s*\.version\s+(\S+)", text, re.M)
    target = re.search(r"^\s*\.target\s+([\w, ]+)", text, re.M)
    if not version or not target:
        raise UserError(f"{path} is no PTX: it has no .{'target' if version else 'version'}")
    number = re.fullmatch(r"(\d+)\.(\d+)", version[1])
    if not number or (int(number[1]), int(number[2])) > NEWEST:
        raise UserError(
            f"PTX ISA {version[1]} in {path} is not known here: {NEWEST[0]}.{NEWEST[1]} is the newest that is"
        )
    functions = functions_of(text)
    if not functions:
        raise UserError(f"{path} has no function: PTX to audit has an .entry or a .func with a body")
    files = "\n".join(re.findall(r'^\s*\.file\s+\d+\s+".*', text, re.M))
    about = f"{target[1].strip()}, PTX ISA {version[1]}"
    if not re.search(r"^\s*\.loc\s", text, re.M):
        files = f'.file 1 "{path.name}"'
        return [_row(name, about, files + "\n" + numbered(body, line)) for name, line, body in functions]
    return [_row(name, about, f"{files}\n{body}") for name, _, body in functions]


def read_ptx(path: Path) -> str:
    """The text of a file. Raises UserError where there is none, it is empty, or it is no text."""
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text: PTX is, a cubin or fatbin is not (cuobjdump -ptx takes it out)") from error
    if not text.strip():
        raise UserError(f"{path} is empty: PTX begins with .version")
    return text


def functions_of(text: str) -> list[tuple[str, int, str]]:
    """(name, first line, body) of each kernel and function that has a body."""
    text, found, behind = re.sub(r"//[^\n]*(?<!inline asm)(?=\n)", "", text), [], 0
    while head := FUNCTION.search(text, behind):
        depth, behind = 1, head.end()
        for brace in re.finditer(r"[{}]", text[head.end() :]):
            depth += 1 if brace[0] == "{" else -1
            if not depth:
                behind += brace.start()
                break
        found.append((head[1], text.count("\n", 0, head.end()) + 1, text[head.end() : behind]))
    return found


def numbered(body: str, first: int) -> str:
    """The body with a place for each line: its own in the file."""
    return "\n".join(f".loc 1 {first + n} 1\n{line}" for n, line in enumerate(body.split("\n")))


def _row(name: str, target: str, text: str) -> dict[str, Any]:
    nodes = ptx_graph(text)
    found = machine_roundings(nodes)
    places = Counter((each.kind, value_of(each), where_of(each)) for each in found)
    unknown = [op for node in nodes if is_unknown(op := opcode(node.text)) or OPAQUE.match(op)]
    return {
        "target": target,
        "kernel": name,
        "status": "reported",
        "machine": listed(each.kind for each in found),
        "roundings": "; ".join(
            f"{kind} of {what}, {place}" + (f" ({count} times)" if count > 1 else "")
            for (kind, what, place), count in places.items()
        ),
        "not_followed": listed(unknown),
        "fused": sum(map(is_fused, nodes)),
        "matrix": listed(sorted(set(MATRIX_INSTRUCTION.findall(text)))),
    }


def where_of(rounding: Rounding) -> str:
    """Its place, and that of the call that brought it there: cuda_bf16.hpp is called from somewhere."""
    place = max(rounding.places, default=NOWHERE)
    return spot(place) + (f", called {spot((place[1], ''))}" if place[1] else "")


def value_of(rounding: Rounding) -> str:
    """What is rounded, by what computes it."""
    node = rounding.value
    if node is rounding.node:
        return f"its own result ({opcode(node.text)})"
    names = dict.fromkeys(_title(each) for each in sorted(origins(node, (*MERGES, "widened")), key=lambda n: n.text))
    return " or ".join(names)


def _title(node: Node) -> str:
    if node.op == "fmul" and any(each.op == "frsqrt" for arg in node.args for each in origins(arg)):
        return "a product with a reciprocal root"
    if MATRIX_RESULT.match(node.op):
        return "a matrix product"
    if node.op.startswith("ld."):
        return "what is loaded"
    return TITLES.get(node.op, opcode(node.text) or "what comes in")
