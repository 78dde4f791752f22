"""What each instruction rounds to, as tables: conversions, and arithmetic that has a narrow type.

A line is an opcode and the type to which it rounds; `-` where it rounds to none: its result holds whatever goes in, or
is an integer, or is fp32 as all arithmetic of the chain is. In an opcode `a|b` stands for either, `ftz?` may be left
out, and a word in capitals is one of WORDS. What is in no line and has a narrow type is not known here, and is said to
be so.

Sources: PTX ISA 8.8 and 9.0, with what Triton's 9.4 adds, in its chapters on half precision, on mixed precision, and
on data movement and conversion (cvt); AMD CDNA3 ISA, vector ALU. ptxas takes every line of PTX, in its tests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

WORDS = {
    "INT": "u8|u16|u32|u64|s8|s16|s32|s64",
    "LONG": "u16|u32|u64|s16|s32|s64",
    "WHOLE": "rni|rzi|rmi|rpi",
    "ANY": "rn|rz|rm|rp",
    "FP16": "f16|f16x2",
    "BF16": "bf16|bf16x2",
}
CLAMPS = ("ftz", "sat", "satfinite", "relu", "oob", "noftz")  # in any order; these lines do not have them
PTX = """
cvt.INT.INT                                     -
cvt.pack.u16|s16.s32                            -
cvt.pack.u2|s2|u4|s4|u8|s8.s32.b32              -
cvt.WHOLE.INT.f16|f32|f64                       -
cvt.WHOLE.LONG.bf16                             -
cvt.ANY.f16.u8|s8                               -
cvt.ANY.f16.LONG                                fp16
cvt.ANY.bf16.LONG                               bf16
cvt.ANY.f32|f64.INT                             -

cvt.f32.f16|f32                                 -
cvt.ANY?.f32.bf16                               -
cvt.f64.f16|f32|f64                             -
cvt.ANY?.f64.bf16                               -
cvt.f16.f16                                     -
cvt.bf16.bf16                                   -
cvt.WHOLE.f32.f32                               -
cvt.WHOLE.f64.f64                               -
cvt.WHOLE.f16.f16                               -
cvt.WHOLE.bf16.bf16                             -
cvt.ANY.f32.f64                                 fp32
cvt.ANY.f16.f64                                 fp16
cvt.ANY.bf16.f64                                bf16
cvt.ANY?.bf16.f16                               bf16
cvt.ANY?.f16.bf16                               fp16

cvt.ANY.f16.f32                                 fp16
cvt.rn|rz|rs.f16x2.f32                          fp16
cvt.ANY.bf16.f32                                bf16
cvt.rn|rz|rs.bf16x2.f32                         bf16
cvt.rn|rz|rna.tf32.f32                          tf32

cvt.rn.e4m3x2.f32|f16x2|bf16x2                  e4m3
cvt.rn.e5m2x2.f32|f16x2|bf16x2                  e5m2
cvt.rs.e4m3x4.f32                               e4m3
cvt.rs.e5m2x4.f32                               e5m2
cvt.rn.f16x2|bf16x2.e4m3x2|e5m2x2               -
cvt.rn.e2m3x2.f32|f16x2|bf16x2                  e2m3
cvt.rn.e3m2x2.f32|f16x2|bf16x2                  e3m2
cvt.rs.e2m3x4.f32                               e2m3
cvt.rs.e3m2x4.f32                               e3m2
cvt.rn.f16x2|bf16x2.e2m3x2|e3m2x2               -
cvt.rn.e2m1x2.f32|f16x2|bf16x2                  e2m1
cvt.rs.e2m1x4.f32                               e2m1
cvt.rn.f16x2|bf16x2.e2m1x2                      -
cvt.rz|rp.ue8m0x2.f32|bf16x2                    ue8m0
cvt.rn.bf16x2.ue8m0x2                           -

add|sub|mul.rn?.FP16                            fp16
add|sub|mul.rn?.BF16                            bf16
fma.rn.FP16                                     fp16
fma.ANY.BF16                                    bf16
tanh|ex2.approx.FP16                            fp16
tanh|ex2.approx.BF16                            bf16
add|sub.ANY?.f32.f16|bf16                       -
fma.ANY.f32.f16|bf16                            -
add|sub|mul.ANY?.f32x2                          -
fma.ANY.f32x2                                   -
"""
AMD = """
v_cvt_f16_f32                                              fp16
v_cvt_pkrtz_f16_f32                                        fp16
v_cvt_f16_u16|v_cvt_f16_i16                                fp16
v_cvt_f32_f64                                              fp32
v_cvt_pk_fp8_f32|v_cvt_sr_fp8_f32                          e4m3fnuz
v_cvt_pk_bf8_f32|v_cvt_sr_bf8_f32                          e5m2fnuz
v_cvt_f32_f16|v_cvt_f64_f32                                -
v_cvt_f32_fp8|v_cvt_pk_f32_fp8                             -
v_cvt_f32_bf8|v_cvt_pk_f32_bf8                             -
v_cvt_u16_f16|v_cvt_i16_f16                                -
v_add_f16|v_sub_f16|v_subrev_f16|v_mul_f16                 fp16
v_fma_f16|v_mad_f16|v_mac_f16|v_fmac_f16                   fp16
v_fma_mixlo_f16|v_fma_mixhi_f16                            fp16
v_pk_add_f16|v_pk_mul_f16|v_pk_fma_f16                     fp16
v_rcp_f16|v_sqrt_f16|v_rsq_f16|v_log_f16|v_exp_f16         fp16
v_sin_f16|v_cos_f16|v_div_fixup_f16|v_ldexp_f16            fp16
v_fma_mix_f32                                              -
v_dot2_f32_f16|v_dot2_f32_bf16                             -
v_dot2c_f32_f16|v_dot2c_f32_bf16                           -
"""
MODES = {"rn": "rne", "rz": "rtz", "rna": "rna", "rm": "down", "rp": "up", "rs": "stochastic"}
NARROW = re.compile(r"[._](bf16|f16|tf32|fp8|bf8|u?e\dm\d)")  # a float type of a conversion or of arithmetic
ARITHMETIC = re.compile(
    r"(cvt|add|sub|mul|fma|mad|div|rcp|sqrt|rsqrt|sin|cos|lg2|ex2|tanh|atom|red)\.|v_(pk_)?(cvt|add|sub|mul|fma|mad|dot)"
)
# Of each format the exponents of the largest and of the least normal number, and the bits behind the point.
FORMATS = {
    "fp64": (1023, -1022, 52), "fp32": (127, -126, 23), "tf32": (127, -126, 10), "bf16": (127, -126, 7),
    "fp16": (15, -14, 10), "e5m2": (15, -14, 2), "e4m3": (8, -6, 3), "e4m3fnuz": (7, -7, 3), "e5m2fnuz": (15, -15, 2),
    "e4m3b11fnuz": (4, -10, 3), "e3m2": (4, -2, 2), "e2m3": (2, 0, 3), "e2m1": (2, 0, 1), "ue8m0": (127, -127, 0),
    "i1": (0, 0, 0), "s8": (7, 6, 6), "u8": (7, 7, 7), "s16": (15, 14, 14), "u16": (15, 15, 15),
    "s32": (31, 30, 30), "u32": (31, 31, 31), "s64": (63, 62, 62), "u64": (63, 63, 63),
}  # fmt: skip


@dataclass(frozen=True)
class Narrowing:
    """What an instruction rounds: so many values, to that kind (`bf16-rne`); converts: what its operands hold, each
    or, packed, all of them in the first. Otherwise its own results."""

    kind: str
    count: int
    converts: bool
    packed: bool

    @property
    def type(self) -> str:
        return self.kind.partition("-")[0]


def holds(wide: str, narrow: str) -> bool:
    """Whether every number of the second of FORMATS is one of the first too."""
    (most, least, bits), (most_of, least_of, bits_of) = FORMATS[wide], FORMATS[narrow]
    return bits_of <= bits and most_of <= most and least_of - bits_of >= least - bits


def opcode(text: str) -> str:
    """The opcode of an instruction, without its guard, and without AMD's encoding."""
    found = re.match(r"[\s{}]*(?:@!?[%\w]+\s+)?([\w.:]+)", text)
    return re.sub(r"(_e32|_e64|_sdwa|_dpp)+$", "", found[1]) if found else ""


@cache
def narrowing(op: str) -> Narrowing | None:
    """What the instruction of that opcode rounds to a narrow type; None where it does not, or is not known."""
    to = _looked_up(op)
    if to in (None, "-"):
        return None
    words = [word for word in op.split(".") if word not in CLAMPS]
    if op.startswith("v_"):
        stochastic, truncates = "_sr_" in op, "rtz" in op
        mode = "stochastic" if stochastic else "rtz" if truncates else "rne"
        count = 2 if "_pk" in op else 1
        return Narrowing(f"{to}-{mode}", count, op.startswith("v_cvt"), False)
    mode = next((MODES[word] for word in words if word in MODES), "rne")
    packed = re.fullmatch(r"(.*\d)x(\d)", words[-2 if words[0] == "cvt" else -1])
    count = int(packed[2]) if packed else 1
    return Narrowing(f"{to}-{mode}", count, words[0] == "cvt", words[-1].endswith("x2"))


@cache
def widens(op: str) -> str | None:
    """The format that a conversion between floats hands on as it is: its operand's; None where it is none such."""
    changes = {*CLAMPS, *WORDS["WHOLE"].split("|")} & set(op.split("."))
    if changes or _looked_up(op) != "-" or not re.match(r"cvt\.|v_cvt_", op):
        return None
    if op.startswith("v_cvt_"):
        of = {"fp8": "e4m3fnuz", "bf8": "e5m2fnuz"}.get(op.rpartition("_")[2], _named(op.rpartition("_")[2]))
        return of if re.match(r"v_cvt_(pk_)?f", op) and of in FORMATS else None
    to, of = (_named(re.sub(r"x2$", "", word)) for word in op.split(".")[-2:])
    return of if to in FORMATS and to[0] not in "su" and of in FORMATS and holds(to, of) else None


@cache
def is_unknown(op: str) -> bool:
    """Whether this is a conversion, or arithmetic with a narrow type, of which the tables know nothing."""
    narrow = op.startswith("cvt.") or bool(NARROW.search(op))
    return narrow and bool(ARITHMETIC.match(op)) and _looked_up(op) is None


def opcodes(table: str) -> list[tuple[str, str]]:
    """Every opcode of a table with its type, once."""
    return [(op, to) for line in filter(None, table.splitlines()) for op, to in _spelt(line)]


def _spelt(line: str) -> list[tuple[str, str]]:
    pattern, to = line.split()
    found = [""]
    for word in pattern.split("."):
        choices = _choices(word)
        found = [f"{before}.{each}" if each else before for before in found for each in choices]
    return [(op[1:], to) for op in found]


def _choices(word: str) -> list[str]:
    names = [each for name in word.removesuffix("?").split("|") for each in WORDS.get(name, name).split("|")]
    return [*names, *([""] if word.endswith("?") else [])]


@cache
def _table() -> dict[str, str]:
    return dict(opcodes(PTX) + opcodes(AMD))


def _looked_up(op: str) -> str | None:
    return _table().get(".".join(word for word in op.split(".") if word not in CLAMPS))


def _named(type_: str) -> str:
    return re.sub(r"^f(?=\d\d)", "fp", type_)
