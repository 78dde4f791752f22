"""Instructions that only compute, in a row, leave what they leave one after the other."""

import functools
import itertools

import numpy as np
import pytest
import torch
from ptx_isa import definition
from ptx_support import THREADS, ints, kernel, run, words

from castpoint.harness.ptx import isa, machine
from castpoint.harness.ptx.arithmetic import of_values
from castpoint.harness.ptx.blocks import NAMES, Block, blocks
from castpoint.harness.ptx.numbers import UNSIGNED, Unsupported, read, width
from castpoint.harness.ptx.program import Program, parse

OPCODES = sorted({opcode for opcode in isa.opcodes() if opcode.split(".")[0] in NAMES and definition(opcode)})
COUNTS = {"rs": 16, "r": 32, "rd": 64, "p": 1}  # registers of each kind, eight, and their bits
EIGHT = range(30, 38)
DECLARED = ".reg .b16 %rs<40>; .reg .b32 %r<40>; .reg .b64 %rd<40>; .reg .pred %p<40>;"
NUMBERS = [0, 1, -1, 3, 8, 16, 24, 31, 32, 63, 64, 0x5410, 0x7632, 0x0123, 0x8000, 0x3F80, 0x3F800000, 0xFFFF, 1 << 31]


def register(kind: str, n: int) -> str:
    bits = 1 if kind == "pred" else 32 if kind.endswith("x2") else max(16, int(kind.lstrip("bsuf")))
    return f"%{next(name for name, size in COUNTS.items() if size == bits)}{n}"


def drawn(rng: np.random.Generator, count: int) -> str:
    """So many instructions of eight registers of each kind, and of numbers where an instruction takes them."""
    lines = []
    while len(lines) < count:
        opcode = OPCODES[rng.integers(len(OPCODES))]
        defined = definition(opcode)
        sources = []
        for kind in defined.takes:
            number = str(NUMBERS[rng.integers(len(NUMBERS))])
            sources.append(number if kind == "#" or rng.random() < 0.3 else register(kind, rng.choice(EIGHT)))
        if defined.takes[-1] == "#":
            sources[-1] = str(rng.integers(256))
        lines.append(f"{opcode} {register(defined.gives, rng.choice(EIGHT))}, {', '.join(sources)};")
    return "\n".join(lines)


def held() -> str:
    """Every register, to memory."""
    lines = []
    for n in EIGHT:
        lines += [f"cvt.u32.u16 %r29, %rs{n};", f"mov.b64 {{%r27, %r28}}, %rd{n};", f"selp.b32 %r26, 1, 0, %p{n};"]
        lines += [f"st.global.b32 [%rd2 + {4 * THREADS * (5 * (n - EIGHT[0]) + k)}], {name};" for k, name in enumerate(
            ("%r29", "%r27", "%r28", "%r26", f"%r{n}")
        )]  # fmt: skip
    return "\n".join(lines)


def loaded() -> str:
    lines = []
    for n in EIGHT:
        at = 4 * THREADS * 2 * (n - EIGHT[0])
        lines += [f"ld.global.b32 %r{n}, [%rd1 + {at}];", f"ld.global.b32 %r29, [%rd1 + {at + 4 * THREADS}];"]
        lines += [f"mov.b64 %rd{n}, {{%r29, %r{n}}};", f"cvt.u16.u32 %rs{n}, %r29;", f"setp.lt.s32 %p{n}, %r29, 0;"]
    return "\n".join(lines)


def stored(body: str, values: np.ndarray) -> np.ndarray:
    out = torch.zeros(5 * len(EIGHT) * THREADS, dtype=torch.int32)
    run(f"{DECLARED} {loaded()} {body} {held()}", ints(values), out)
    return words(out)


def noting(ran: list[int], program: Program) -> dict[int, Block]:
    """The blocks, which note that they run."""

    def noted(block: Block) -> Block:
        return block._replace(function=lambda *sources: ran.append(block.end) or block.function(*sources))

    return {place: noted(block) for place, block in blocks(program).items()}


BODIES = {
    "by all": lambda rng: drawn(rng, 60),
    "by a part, then by the others": lambda rng: f"""
        setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__one; {drawn(rng, 30)} bra.uni $L__end;
    $L__one:
        {drawn(rng, 30)}
    $L__end:
        {drawn(rng, 10)} bar.sync 0;""",
    "in a loop": lambda rng: f"""
        mov.b32 %r3, 0;
    $L__in:
        {drawn(rng, 20)} add.s32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, 4; @%p1 bra $L__in; {drawn(rng, 9)}""",
    "with guards": lambda rng: f"setp.lt.u32 %p1, %r1, 9; {drawn(rng, 20)} @%p1 {drawn(rng, 20)}",
    "beside what only some wrote": lambda rng: f"""
        setp.lt.u32 %p1, %r1, 9; @%p1 bra $L__one; mov.b32 %r25, 5; bra.uni $L__end;
    $L__one:
        mov.b32 %r25, %r1; add.s32 %r24, %r25, 1; add.s32 %r30, %r24, %r25;
    $L__end:
        add.s32 %r31, %r25, %r30; {drawn(rng, 9)}""",
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_a_block_is_its_instructions_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(len(name))
    few = np.array([0, 1, 0x3F800000, 0x7F800001, 0x80000001, 0xFFFFFFFF, 0x00800000, 0x3F803F80], np.uint32)
    for seed in range(40):
        body = BODIES[name](np.random.default_rng(seed))
        values = rng.integers(0, 1 << 32, 2 * len(EIGHT) * THREADS, np.uint64).astype(np.uint32)
        values[::3] = rng.choice(few, len(values[::3]))
        ran: list[int] = []
        monkeypatch.setattr(machine, "blocks", functools.partial(noting, ran))
        at_once = stored(body, values)
        monkeypatch.setattr(machine, "blocks", lambda program: {})
        assert np.array_equal(at_once, stored(body, values)), body
        assert ran


BY_NUMBERS = {
    "shl.b16": [(n,) for n in (0, 1, 15, 16, 17, 65537)],
    "shl.b32": [(n,) for n in (0, 1, 31, 32, 33, 256)],
    "shl.b64": [(n,) for n in (0, 1, 33, 63, 64)],
    "shr.u32": [(n,) for n in (0, 1, 31, 32, 300)],
    "shr.s32": [(n,) for n in (0, 1, 31, 32, 300)],
    "shr.b64": [(n,) for n in (0, 33, 63, 64)],
    "shr.s64": [(n,) for n in (0, 33, 63, 64)],
    "bfe.u32": [*itertools.product((0, 8, 16, 31, 32, 200), (0, 1, 8, 16, 31, 32, 33, 255))],
    "bfe.s32": [*itertools.product((0, 8, 16, 31, 32), (0, 1, 8, 31, 32, 33))],
    "bfe.u64": [*itertools.product((0, 8, 40, 63, 64), (0, 1, 31, 63, 64, 65))],
    "prmt.b32": [(n,) for n in (0x3210, 0x7654, 0x5410, 0x7632, 0x0123, 0, 0x4040, 0x2736, 0x8888, 0x3218, 0xBA98)],
}


@pytest.mark.parametrize("opcode", BY_NUMBERS)
def test_by_numbers_it_is_what_the_isa_says(opcode: str) -> None:
    defined, values = definition(opcode), np.random.default_rng(0).integers(0, 1 << 32, 2 * 8 * THREADS, np.uint64)
    kind, registers = defined.takes[0], len(defined.takes) - len(BY_NUMBERS[opcode][0])
    sources = [register(kind, n) for n in (30, 31)[:registers]]
    for numbers in BY_NUMBERS[opcode]:
        text = f"{opcode} {register(defined.gives, 32)}, {', '.join([*sources, *map(str, numbers)])};"
        assert [block for block in blocks(parse(kernel(f"{DECLARED} {text} st.global.b32 [%rd1], %r1;"))).values()]
        found = stored(text, values.astype(np.uint32)).reshape(8, 5, THREADS)
        rows = values.reshape(8, 2, THREADS)
        both = {"rs": rows[:, 1] & 0xFFFF, "r": rows[:, 0], "rd": rows[:, 1] | rows[:, 0] << np.uint64(32)}
        given = both[sources[0].strip("%0123456789")][:registers].tolist()
        bits = {
            "b16": found[2, 0],
            "b32": found[2, 4],
            "b64": found[2, 1] | found[2, 2].astype(np.uint64) << np.uint64(32),
        }
        size = f"b{16 if kind.endswith('16') else 64 if kind.endswith('64') else 32}"
        expected = [defined.of(*each, *numbers) & (1 << int(size[1:])) - 1 for each in zip(*given, strict=True)]
        assert bits[size].tolist() == expected, text


def test_a_block_reads_what_was_never_written_as_one_by_one_does() -> None:
    """Refused where what it stores depends on it, with its name."""
    with pytest.raises(Unsupported, match="%r33, read before it is written"):
        run(
            f"{DECLARED} add.s32 %r30, %r1, 1; add.s32 %r31, %r33, %r30; st.global.b32 [%rd1], %r31;",
            ints(np.zeros(THREADS)),
        )


def test_a_register_of_one_block_keeps_what_it_had_when_that_comes_again() -> None:
    """It is read before it is written, and its bits count from the second time on."""
    loop = "setp.eq.s32 %p2, %r3, 0; selp.b32 %r24, 0, %r25, %p2; add.s32 %r25, %r24, 5; add.s32 %r3, %r3, 1;"
    last = "setp.lt.u32 %p1, %r3, 4; @%p1 bra $L__in; st.global.b32 [%rd1], %r30;"
    out = ints(np.zeros(THREADS))
    run(f"{DECLARED} mov.b32 %r3, 0;\n$L__in:\n{loop} add.s32 %r30, %r24, 5; {last}", out)
    assert words(out).tolist() == [20] * THREADS


def test_what_an_opcode_gives_is_known_beforehand() -> None:
    bits = np.array([0, 1, 0x3F80, 0x7FC0, 0x3F800000, 0x7F800001, 1 << 63], np.uint64)
    for opcode, given in itertools.product(OPCODES, (bits, bits[1])):  # of threads, and of what is one for all
        function, kinds, result = of_values(tuple(opcode.split(".")))
        values = [read(given, kind) for kind, _ in zip(kinds, definition(opcode).takes, strict=False)]
        values[3:] = [np.uint32(150)] * len(values[3:])  # the table of lop3
        with np.errstate(all="ignore"):
            assert function(*values).dtype == (np.bool_ if result == "pred" else UNSIGNED[width(result)]), opcode


def test_blocks_that_are_alike_are_one_function() -> None:
    """Registers of other names, and what of them is read elsewhere."""
    one = "add.s32 %r30, %r1, 7; shl.b32 %r31, %r30, 2;"
    other = "add.s32 %r32, %r3, 7; shl.b32 %r33, %r32, 2;"
    text = f"{DECLARED} bar.sync 0; {one} st.global.b32 [%rd1], %r31; {other} st.global.b32 [%rd1], %r33;"
    *_, first, second = blocks(parse(kernel(text))).values()
    assert first.function is second.function and (first.writes, second.writes) == (("%r31",), ("%r33",))
    *_, third, _ = blocks(parse(kernel(f"{text} st.global.b32 [%rd1], %r30;"))).values()
    assert third.function is not second.function and set(third.writes) == {"%r30", "%r31"}
