"""Every line of the audit's tables: ptxas takes it, it rounds what it says, and nothing that ptxas takes is missing."""

from __future__ import annotations

import functools
import itertools
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import triton

from castpoint.harness.audit.assembly import amdgcn_graph, ptx_graph
from castpoint.harness.audit.instructions import (
    AMD,
    CLAMPS,
    FORMATS,
    PTX,
    holds,
    is_unknown,
    narrowing,
    opcodes,
    widens,
)
from castpoint.harness.audit.roundings import machine_roundings

# ---------------------------------------------------------------- instructions with their operands

BITS = {"tf32": 32, "bf16": 16, "f16": 16, "e4m3": 8, "e5m2": 8, "e2m3": 8, "e3m2": 8, "e2m1": 4, "ue8m0": 8}
REGISTERS = {8: "%rb", 16: "%rs", 32: "%r", 64: "%rd"}


def parts(type_: str) -> tuple[str, int]:
    """`e4m3x2` as e4m3 and 2."""
    found = re.fullmatch(r"(.*\d)x([24])", type_)
    return (found[1], int(found[2])) if found else (type_, 1)


def register(type_: str) -> str:
    """The letters of a register for that type; of an integer of eight bits those of 32."""
    one, count = parts(type_)
    bits = BITS.get(one) or int(re.search(r"\d+", one)[0])
    return REGISTERS[32 if one in ("u8", "s8") else max(8, bits * count)]


def instruction(op: str) -> str:
    """PTX of that opcode, on registers."""
    words = op.split(".")
    if words[1] == "pack":
        return f"{op} %r1, %r2, %r3{', %r4' if words[-1] == 'b32' else ''};"
    if words[0] == "cvt":
        (_, count), (_, packed) = parts(words[-2]), parts(words[-1])
        names = [f"{register(words[-1])}{n + 2}" for n in range(count if packed == 1 else 1)]
        names = [f"{{{', '.join(names)}}}"] if count == 4 else names
        return f"{op} {register(words[-2])}1, {', '.join([*names, *(['%r9'] if 'rs' in words else [])])};"
    mixed = words[-2] == "f32"
    count = {"fma": 3, "tanh": 1, "ex2": 1}.get(words[0], 2)
    names = [f"{register(words[-1])}{n + 2}" for n in range(count)]
    names[-1:] = ["%r9"] if mixed else names[-1:]
    return f"{op} {'%r' if mixed else register(words[-1])}1, {', '.join(names)};"


HEAD = """.version {version}
.target sm_100a
.address_size 64
.visible .entry k() {{
.reg .b8 %rb<10>; .reg .b16 %rs<10>; .reg .b32 %r<10>; .reg .b64 %rd<10>;
"""


def taken(ops: list[str], folder: Path, version: str = "9.4") -> set[str]:
    """Those of these opcodes that ptxas takes, whatever it says about the others."""
    head = HEAD.format(version=version)
    text = head + "\n".join(map(instruction, ops)) + "\nret;\n}\n"
    (folder / "all.ptx").write_text(text)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    command = [tool, "-arch", "sm_100a", folder / "all.ptx", "-o", folder / "all.cubin"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wrong = {int(line) - head.count("\n") - 1 for line in re.findall(r"line (\d+);", run.stdout + run.stderr)}
    assert wrong or run.returncode == 0, run.stderr
    return {op for n, op in enumerate(ops) if n not in wrong}


def clamped(op: str) -> list[str]:
    """The opcode with each of what may stand in it beside its words."""
    name, *words = op.split(".")
    behind = 1 if words[0] in WORDS or words[0] in ("approx", "pack") else 0
    more = ("", "sat", "ftz", "satfinite")
    return [".".join(filter(None, [name, *words[:behind], each, *words[behind:]])) for each in more]


def bare(op: str) -> str:
    return ".".join(word for word in op.split(".") if word not in CLAMPS)


def test_ptxas_takes_every_line(tmp_path: Path):
    table = [op for op, _ in opcodes(PTX)]
    assert len(table) == len(set(table)) > 400
    found = taken([each for op in table for each in clamped(op)], tmp_path)
    assert not set(table) - {bare(op) for op in found}


@pytest.mark.parametrize("version", ["8.8", "9.0", "9.4"])
def test_whatever_ptxas_takes_is_known(version: str, tmp_path: Path):
    """Every rounding, every clamp, every pair of types of cvt, and of arithmetic that is narrow or mixed."""
    whole = ["u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64", "f16", "bf16", "f32", "f64"]
    two = [f"{each}x2" for each in ("f16", "bf16", "e4m3", "e5m2", "e2m3", "e3m2", "e2m1", "ue8m0")]
    four = [f"{each}x4" for each in ("e4m3", "e5m2", "e2m3", "e3m2", "e2m1")]
    modes = ["", "rn", "rz", "rm", "rp", "rna", "rs", "rni", "rzi", "rmi", "rpi"]
    clamps = ["", "ftz", "sat", "satfinite"] if version == "9.4" else ["", "satfinite"]
    conversions = itertools.product(["cvt"], modes, clamps, [*whole, "tf32", *two, *four], [*whole, *two])
    types = ["f16", "f16x2", "bf16", "bf16x2", "f32.f16", "f32.bf16", "f32x2"]
    clamps = ["", "ftz", "sat", "relu", "ftz.relu", "oob"]
    narrow = itertools.product(["add", "sub", "mul", "fma"], modes[:5], clamps, types, [""])
    ops = [".".join(filter(None, words)) for words in itertools.chain(conversions, narrow)]
    known = {op for op, _ in opcodes(PTX)}
    found = taken(ops, tmp_path, version)
    assert len(found) > 350 and not sorted({bare(op) for op in found} - known)


def test_what_is_not_known_is_said():
    for op in ("cvt.rn.bf16.e4m3", "add.rn.bf16x4", "mul.f32.bf16", "red.global.add.noftz.bf16", "v_cvt_pk_bf16_f32"):
        assert is_unknown(op) and narrowing(op) is None and widens(op) is None
    for op in (
        "cvt.rn.bf16.f32",
        "cvt.rn.satfinite.relu.e4m3x2.f32",
        "add.f32",
        "ld.global.b16",
        "mov.b32",
        "cvt.u32.u64",
    ):
        assert not is_unknown(op)


# ---------------------------------------------------------------- what a line rounds

FLOATS = {  # bits of the exponent, bits behind the point, bias, whether the largest exponent is infinity and NaN
    "f16": (5, 10, 15, True), "bf16": (8, 7, 127, True), "e5m2": (5, 2, 15, True), "e4m3": (4, 3, 7, False),
    "e3m2": (3, 2, 3, False), "e2m3": (2, 3, 1, False), "e2m1": (2, 1, 1, False), "tf32": (8, 10, 127, True),
    "e4m3fnuz": (4, 3, 8, False), "e5m2fnuz": (5, 2, 16, False), "e4m3b11fnuz": (4, 3, 11, False),
}  # fmt: skip
WORDS = {"rn": "rne", "rz": "rtz", "rna": "rna", "rm": "down", "rp": "up", "rs": "stochastic"}


@functools.cache
def values(type_: str) -> set[float]:
    """Every finite number of a type of at most 19 bits, or numbers at the edges of an integer or a wide float."""
    if type_ == "ue8m0":
        return {2.0**n for n in range(-127, 128)}
    if type_ in FLOATS:
        exponents, bits, bias, special = FLOATS[type_]
        found = {m * 2.0 ** (1 - bias - bits) for m in range(1 << bits)}
        last = (1 << exponents) - (1 if special else 0)
        found |= {(1 + m / 2**bits) * 2.0 ** (e - bias) for e in range(1, last) for m in range(1 << bits)}
        return found - {480.0} if type_ == "e4m3" else found  # where its NaN is
    if type_[0] in "us":
        most = (1 << int(type_[1:]) - (type_[0] == "s")) - 1
        edges = {most, most - 1, most // 3, most >> 10, *range(min(most, 1 << 13) + 1), (1 << 24) + 1, (1 << 53) - 1}
        return {each for each in edges if each <= most}
    return {1.0 + 2.0 ** -(23 if type_ == "f32" else 52), 3.0, 2.0**100, 2.0**-100}


def goes_into(of: str, to: str) -> bool:
    """Whether every number of the first type is one of the second, by enumeration."""
    numbers = values(of)
    if to == "f32":
        return all(float(np.float32(each)) == each for each in numbers)
    if to == "f64":
        return all(float(each) == each for each in numbers)
    return to in (*FLOATS, "ue8m0") and numbers <= values(to)


TABLE = opcodes(PTX)


def test_a_conversion_rounds_where_its_type_cannot_hold_all_numbers():
    """`-` is exact, or makes whole numbers, or makes fp32 and fp64 of integers."""
    compared = 0
    for op, to_ in TABLE:
        words = op.split(".")
        if words[0] != "cvt" or words[1] == "pack" or words[-2][0] in "us" and words[-2] != "ue8m0x2":
            continue
        (to, _), (of, _) = parts(words[-2]), parts(words[-1])
        whole, of_integer = any(each.endswith("i") for each in words), of[0] in "us" and of != "ue8m0"
        if whole or of_integer and to in ("f32", "f64"):
            assert to_ == "-"
            continue
        compared += 1
        assert (to_ == "-") == goes_into(of, to), op
        assert to_ in ("-", re.sub(r"^f", "fp", to)), op
        assert (widens(op) is not None) == (to_ == "-"), op
    assert compared > 90


def test_formats_hold_what_their_numbers_say():
    names = {"f16": "fp16", "f32": "fp32", "f64": "fp64"}
    integers = [f"{sign}{bits}" for sign in "us" for bits in (8, 16, 32, 64)]
    types = [*FLOATS, "ue8m0", "f32", "f64"]
    assert {names.get(each, each) for each in (*types, *integers)} == set(FORMATS) - {"i1"}
    for of, to in itertools.product([*types[:-2], *integers], types):
        assert holds(names.get(to, to), names.get(of, of)) == goes_into(of, to), (of, to)


def test_narrow_arithmetic_rounds_to_its_type_and_mixed_to_fp32():
    found = [(op, type_) for op, type_ in TABLE if not op.startswith("cvt.")]
    assert len(found) > 60
    for op, type_ in found:
        words = op.split(".")
        wide = words[-1] == "f32x2" or words[-2] == "f32"
        assert type_ == ("-" if wide else {"f16": "fp16"}.get(parts(words[-1])[0], "bf16")), op


def test_each_line_is_found_in_a_graph_as_often_as_it_rounds():
    """One instruction between loads and a store: as many roundings as it has lanes, of the kind that it says."""
    for op, type_ in TABLE:
        words = op.split(".")
        text = instruction(op)
        names = re.findall(r"%\w+", text)
        loads = "".join(f"\tld.global.b32 \t{name}, [%rd{n}];\n" for n, name in enumerate(names[1:]))
        found = machine_roundings(ptx_graph(f"{loads}\t{text}\n\tst.global.b32 \t[%rd0], {names[0]};\n"))
        if type_ == "-":
            assert not found, op
            continue
        mode = next((WORDS[word] for word in words if word in WORDS), "rne")
        lanes = parts(words[-2] if words[0] == "cvt" else words[-1])[1]
        assert [each.kind for each in found] == [f"{type_}-{mode}"] * lanes, op
        given = {each.value.text.split()[1].rstrip(",") for each in found if each.value is not each.node}
        assert "%r9" not in given, op  # the bits of a stochastic rounding


def test_each_line_of_amd_is_found():
    for op, type_ in opcodes(AMD):
        to, of = re.match(r"v_cvt_(?:pk_|sr_|pkrtz_)?([a-z0-9]+)_(\w+)", op + "_").groups() if "cvt" in op else ("", "")
        into = {"f16": "fp16", "fp8": "e4m3fnuz", "bf8": "e5m2fnuz"} | ({"f32": "fp32"} if of == "f64_" else {})
        assert type_ == (into.get(to, "-") if to else "-" if "_f32" in op else "fp16"), op
        mixed = op.startswith("v_fma_mix")
        operands = "v2, v3, v4" if re.search(r"fma|mad|div_fixup|dot2_", op) else "v2, v3"
        text = f"\tglobal_load_dword v2, v[8:9], off\n\tglobal_load_dword v3, v[8:9], off\n\t{op} v1, {operands}\n"
        found = machine_roundings(amdgcn_graph(text + "\tglobal_store_dword v[8:9], v1, off\n"))
        mode = "stochastic" if "_sr_" in op else "rtz" if "rtz" in op else "rne"
        count = 2 if "_pk" in op and not mixed else 1
        assert [each.kind for each in found] == ([] if type_ == "-" else [f"{type_}-{mode}"] * count), op
