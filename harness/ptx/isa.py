"""Every instruction that is known here: its opcode, its operands. Whatever is not in TABLE is refused.

A row is an opcode and its operands. In an opcode `a|b` stands for either, and `ftz?` may be left out; in words with a
colon that is an underline (`L2_cache_hint`). Operands, one word each:

    r  a register            p  a predicate           #  a number        [  an address       s  a name
    v  a register, number    q  a predicate, its opposite, a number      {4  a list of four
    w  a register, number or a list of one            d  a register, or a register|predicate      {  any list
    v? may be left out       #* any number of them

PTX ISA 9.1, chapter 9.7, of which this is a part: what is done here for targets up to sm_90.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterator, Sequence

WORDS = {
    "INT": "u16|u32|u64|s16|s32|s64",
    "LONG": "u16|u32|s16|s32",  # that have a type twice as wide
    "BITS": "b16|b32|b64",
    "FLAT": "f32|bf16",
    "BF16": "bf16|bf16x2",
    "ANY": "b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32",  # in memory
    "UPTO32": "b8|b16|b32|u8|u16|u32|s8|s16|s32|f32",
    "EVEN": "s8|s16|s32|s64|u8|u16|u32|u64",
    "SMALL": "s8|s16|s32|u8|u16|u32",
    "ORDER": "eq|ne|lt|le|gt|ge",
    "ORDERED": "eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan",
    "LOGIC": "and|or|xor",
    "WHOLE": "rni|rzi|rmi|rpi",
    "SHARED": "shared|shared_cta",
    "KEEP": "L1_evict_first|L1_evict_last",
    "SEM": "relaxed|acquire|release|acq_rel",
    "SCOPE": "cta|cluster|gpu|sys",
    "COLUMNS": "|".join(f"m64n{n}k16" for n in range(8, 257, 8)),
}
TABLE = """
add|sub|mul.rn?.ftz?.f32                                        r v v
add|sub|mul.rn?.BF16                                            r v v
fma.rn.ftz?.f32                                                 r v v v
fma.rn.BF16                                                     r v v v
max|min.ftz?.NaN?.f32                                           r v v
max|min.ftz?.NaN?.xorsign.abs.f32                               r v v
max|min.NaN?.BF16                                               r v v
max|min.NaN?.xorsign.abs.BF16                                   r v v
neg|abs.ftz?.f32                                                r v
neg|abs.BF16                                                    r v
copysign.f32                                                    r v v
div.rn|full|approx.ftz?.f32                                     r v v
rcp|sqrt.rn|approx.ftz?.f32                                     r v
rsqrt|ex2|lg2.approx.ftz?.f32                                   r v

add|sub|min|max|div|rem.INT                                     r v v
add.u16x2|s16x2                                                 r v v
mul.lo|hi.INT                                                   r v v
mul.wide.LONG                                                   r v v
mad.lo.INT                                                      r v v v
mad.wide.LONG                                                   r v v v
neg|abs.s16|s32|s64                                             r v
LOGIC.BITS                                                      r v v
not.BITS                                                        r v
shl.BITS                                                        r v v
shr.BITS|INT                                                    r v v
bfe.u32|u64|s32|s64                                             r v v v
prmt.b32                                                        r v v v
lop3.b32                                                        r v v v #
LOGIC.pred                                                      p q q
not.pred                                                        p q

setp.eq|ne.LOGIC?.BITS                                          p v v q?
setp.ORDER.LOGIC?.s16|s32|s64                                   p v v q?
setp.ORDER|lo|ls|hi|hs.LOGIC?.u16|u32|u64                       p v v q?
setp.ORDERED.LOGIC?.ftz?.f32                                    p v v q?
setp.ORDERED.LOGIC?.bf16                                        p v v q?
selp.BITS|INT|f32                                               r v v q

mov.pred                                                        p q
mov.BITS|INT|f32                                                r v
mov.u32|b32|b64|u64                                             r s
mov.b32                                                         r {2
mov.b32                                                         {2 r
mov.b64                                                         r {2
mov.b64                                                         {2 r
mov.b64                                                         r {4
mov.b64                                                         {4 r
cvt.EVEN.EVEN                                                   r v
cvt.WHOLE.ftz?.EVEN.f32                                         r v
cvt.WHOLE.EVEN.bf16                                             r v
cvt.rn.f32.EVEN                                                 r v
cvt.rn.bf16.SMALL                                               r v
cvt.rn|rz.bf16.f32                                              r v
cvt.rn|rz.bf16x2.f32                                            r v v
cvt.f32.bf16|f16                                                r v
cvt.WHOLE?.ftz?.f32.f32                                         r v
cvt.ftz?.sat.f32.f32                                            r v

ld.param.ANY                                                    r [
ld.volatile?.global|SHARED.ANY                                  w [
ld.volatile?.global|SHARED.v2.ANY                               {2 [
ld.volatile?.global|SHARED.v4.UPTO32                            {4 [
ld.relaxed|acquire.SCOPE.global.ANY                             w [
ld.global.ca|cg|cv?.nc?.L2_cache_hint?.ANY                      w [ r?
ld.global.nc?.KEEP.L2_cache_hint?.ANY                           w [ r?
ld.global.ca|cg|cv?.nc?.L2_cache_hint?.v2.ANY                   {2 [ r?
ld.global.nc?.KEEP.L2_cache_hint?.v2.ANY                        {2 [ r?
ld.global.ca|cg|cv?.nc?.L2_cache_hint?.v4.UPTO32                {4 [ r?
ld.global.nc?.KEEP.L2_cache_hint?.v4.UPTO32                     {4 [ r?
st.volatile?.global|SHARED.ANY                                  [ w
st.volatile?.global|SHARED.v2.ANY                               [ {2
st.volatile?.global|SHARED.v4.UPTO32                            [ {4
st.relaxed|release.SCOPE.global.ANY                             [ w
st.global.wb|cg|cs|wt?.L2_cache_hint?.ANY                       [ w r?
st.global.KEEP.L2_cache_hint?.ANY                               [ w r?
st.global.wb|cg|cs|wt?.L2_cache_hint?.v2.ANY                    [ {2 r?
st.global.KEEP.L2_cache_hint?.v2.ANY                            [ {2 r?
st.global.wb|cg|cs|wt?.L2_cache_hint?.v4.UPTO32                 [ {4 r?
st.global.KEEP.L2_cache_hint?.v4.UPTO32                         [ {4 r?
cp.async.ca|cg.SHARED.global                                    [ [ # v?
cp.async.ca|cg.SHARED.global.L2_cache_hint                      [ [ # v? r
cp.async.commit_group|wait_all
cp.async.wait_group                                             #
atom.global.SCOPE?.SEM?.add.u32|s32|f32                         r [ v
atom.SEM?.SCOPE?.global.add.u32|s32|f32                         r [ v
red.global.SCOPE?.relaxed|release?.add.u32|s32|f32              [ v
red.relaxed|release?.SCOPE?.global.add.u32|s32|f32              [ v

bra.uni?                                                        s
ret.uni?
exit
bar.sync                                                        #
barrier.sync.aligned?                                           #
bar.warp.sync                                                   v
fence.sc|acq_rel.SCOPE
fence.proxy.async
fence.proxy.async.global|SHARED
membar.cta|gl|sys
griddepcontrol.wait|launch_dependents
prefetch.global.L1|L2                                           [
applypriority.global.L2_evict_normal                            [ #
createpolicy.fractional.L2_evict_first|L2_evict_last|L2_evict_normal|L2_evict_unchanged.b64  r s

shfl.sync.bfly|idx|up.b32                                       d v v # v
redux.sync.add|min|max.u32|s32                                  r v v
redux.sync.LOGIC.b32                                            r v v
ldmatrix.sync.aligned.m8n8.x1.trans?.SHARED.b16                 {1 [
ldmatrix.sync.aligned.m8n8.x2.trans?.SHARED.b16                 {2 [
ldmatrix.sync.aligned.m8n8.x4.trans?.SHARED.b16                 {4 [
stmatrix.sync.aligned.m8n8.x1.trans?.SHARED.b16                 [ {1
stmatrix.sync.aligned.m8n8.x2.trans?.SHARED.b16                 [ {2
stmatrix.sync.aligned.m8n8.x4.trans?.SHARED.b16                 [ {4
mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32             {4 {4 {2 {4
mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32              {4 {4 {2 {4
wgmma.mma_async.sync.aligned.COLUMNS.f32.bf16.bf16              { r r q #*
wgmma.mma_async.sync.aligned.COLUMNS.f32.bf16.bf16              { {4 r q #*
wgmma.fence|commit_group.sync.aligned
wgmma.wait_group.sync.aligned                                   #
"""
FEWEST = {"setp": 3, "ld": 2, "st": 2}  # operands, and one more with these words
MORE = ("and", "or", "xor", "L2_cache_hint")
OPERANDS = {"v": "[r#]", "q": "[pn#]", "w": r"(?:[r#]|\{1)", "d": "(?:r|rp)", "{": r"\{\d+"}


def opcodes() -> Iterator[str]:
    """Every opcode of the table, `cvt.rn.bf16.f32`; again where a later row has it with other operands."""
    for row in _rows():
        yield from (".".join(filter(None, words)) for words in itertools.product(*row[0]))


@functools.cache
def refusal(words: Sequence[str], operands: Sequence[str]) -> str | None:
    """Why an instruction is not executed; None for one of the table. operands: r, p, n (a predicate's opposite), #, [,
    s, rp or {4 of each."""
    opcode, given = ".".join(words), " ".join(operands)
    rows = [operands for choices, operands in _rows() if _is_one(words, choices)]
    if not rows:
        return f"{opcode} is not known here"
    if not any(re.fullmatch(row, given) for row in rows):
        return f"{opcode} with other operands than are known here"
    if words[0] in FEWEST and len(operands) != FEWEST[words[0]] + any(word in MORE for word in words[1:]):
        return f"{opcode} with {len(operands)} operands"
    return None


@functools.cache
def _rows() -> list[tuple[list[list[str]], str]]:
    """Of each row the choices for each word, "" for one that may be left out, and an expression for the operands."""
    rows = []
    for line in filter(None, TABLE.splitlines()):
        opcode, *operands = line.split()
        rows.append(([_choices(word) for word in opcode.split(".")], _expression(operands)))
    return rows


def _choices(word: str) -> list[str]:
    """`rn?`: one that may be left out; `INT|f32`: any of those."""
    named = re.sub(r"[A-Z0-9]+", lambda found: WORDS.get(found[0], found[0]), word.removesuffix("?"))
    return [*named.split("|"), *([""] if word.endswith("?") else [])]


def _is_one(words: Sequence[str], choices: Sequence[Sequence[str]]) -> bool:
    """Whether some choice of each makes these words."""
    if not choices:
        return not words
    here, *later = choices
    if "" in here and _is_one(words, later):
        return True
    return bool(words) and words[0] in here and _is_one(words[1:], later)


def _expression(operands: Sequence[str]) -> str:
    parts = []
    for n, word in enumerate(operands):
        one, space = word.rstrip("?*"), " " if n else ""
        part = OPERANDS.get(one, re.escape(one))
        parts.append(f"(?:{space}{part}){word[len(one) :]}")
    return "".join(parts)
