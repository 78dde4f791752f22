"""The model of a tensor core against sums of fractions, and the check that holds a GPU to it against planted GPUs."""

import hashlib
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from audit_support import in_process
from fake_cuda import FakeCuda

from castpoint.harness.conformance import tensor_cores
from castpoint.harness.conformance.tensor_cores import FAMILIES, INSTRUCTIONS, MMA, WGMMA, operands, same, step_checked
from castpoint.harness.conformance.tensor_model import ALTERNATIVES, EXACT, HOPPER, Model, modelled
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.words import Check, Status
from castpoint.harness.timing.cuda import DeviceLost

FAMILY_NAMES = [family.name for family in FAMILIES]


def of_family(name: str, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The family's part of operands."""
    which = FAMILY_NAMES.index(name)
    return tuple(tensor.chunk(len(FAMILIES))[which] for tensor in tensors)


# ---------------------------------------------------------------- the model, in fractions


def exponent(x: Fraction) -> int:
    """Of x, not 0: x / 2^exponent lies in [1, 2)."""
    guess = abs(x.numerator).bit_length() - x.denominator.bit_length()
    return guess if abs(x) >= Fraction(2) ** guess else guess - 1


def field(x: Fraction) -> int:
    return max(exponent(x), -126)


def fp32(x: Fraction, whole: Callable[[Fraction], int]) -> float:
    """A fraction with its digits below fp32's last cut or rounded off."""
    if not x:
        return 0.0
    last = Fraction(2) ** max(exponent(x) - 23, -149)
    return float(whole(x / last) * last) or (-0.0 if x < 0 else 0.0)


def in_fractions(a: list[float], b: list[float], c: float, model: Model) -> float:
    for start in range(0, len(a), model.products):
        terms = []
        for x, y in zip(map(Fraction, a[start:][: model.products]), map(Fraction, b[start:]), strict=False):
            if x and y:
                scale = field(x) + field(y)
                terms.append(
                    (x * y, scale + 1 if model.normalised and abs(x * y) >= 2 * Fraction(2) ** scale else scale)
                )
        if c:
            terms.append((Fraction(c), field(Fraction(c))))
        unit = Fraction(2) ** (max((scale for _, scale in terms), default=0) - model.bits)
        total = sum((int(term / unit) * unit for term, _ in terms), Fraction(0))  # int cuts toward zero
        c = fp32(total, round if model.nearest else int)  # round takes ties to even
    return c


def sampled(name: str, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some sums of a family: a and b [count, 1, K], c [count, 1, 1], each of a row and a column of its own."""
    a, b, c = of_family(name, operands(MMA))
    pick = torch.arange(count)
    tile, row, column = pick % len(a), pick * 7 % MMA.rows, pick * 3 % MMA.columns
    return a[tile, row][:, None], b[tile, column][:, None], c[tile, row, column][:, None, None]


def fractions_of(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, model: Model) -> torch.Tensor:
    each = zip(a[:, 0].tolist(), b[:, 0].tolist(), c.flatten().tolist(), strict=True)
    return torch.tensor([in_fractions(*terms, model) for terms in each]).reshape(c.shape)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_the_model_equals_sums_of_fractions(name: str) -> None:
    given = sampled(name, 250)
    assert same(modelled(*given), fractions_of(*given, HOPPER)).all()


@pytest.mark.parametrize("model", ALTERNATIVES, ids=str)
def test_the_other_models_equal_sums_of_fractions(model: Model) -> None:
    for name in FAMILY_NAMES:
        given = sampled(name, 20)
        assert same(modelled(*given, model), fractions_of(*given, model)).all(), name


@pytest.mark.parametrize("name", [name for name in FAMILY_NAMES if name != "40 binades"])
@pytest.mark.parametrize(("nearest", "whole"), [(False, int), (True, round)])
def test_with_bits_enough_the_sum_is_exact(name: str, nearest: bool, whole: Callable[[Fraction], int]) -> None:
    a, b, c = sampled(name, 100)
    found = modelled(a, b, c, Model(EXACT, nearest=nearest)).flatten().tolist()
    for row, column, start, value in zip(a[:, 0].tolist(), b[:, 0].tolist(), c.flatten().tolist(), found, strict=True):
        exact = sum((Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True)), Fraction(start))
        assert value == fp32(exact, whole)


def one(a: list[float], b: list[float], c: float, model: Model = HOPPER) -> float:
    padded = (torch.tensor([[*values, *[0.0] * (16 - len(values))]]).bfloat16() for values in (a, b))
    return modelled(*padded, torch.tensor([[c]]), model).item()


def test_sums_by_hand() -> None:
    tiny = 2.0**-25
    assert one([1.0, tiny], [1.0, 1.0], -1.0) == tiny and one([1.0, tiny / 2], [1.0, 1.0], -1.0) == 0.0
    assert one([1.0, tiny], [1.0, 1.0], -1.0, Model(24)) == 0.0
    cancelled = [1.5, -1.5, tiny], [1.5, 1.5, 1.0], 0.0  # 2.25 has the exponent 0 here: 25 binades below 1 are kept
    assert one(*cancelled) == tiny and one(*cancelled, Model(normalised=True)) == 0.0
    assert one([1.0], [2.0**-24], 1.0) == 1.0 and one([-1.0], [2.0**-24], 1.0) == 1.0 - 2.0**-24
    assert (
        one([1.5], [2.0**-23], 1.0) == 1.0 + 2.0**-23 and one([1.5], [2.0**-23], 1.0, Model(nearest=True)) == 1 + 2**-22
    )
    assert one([0.0], [1.0], 0.0) == 0.0 and one([2.0**-133], [1.0], 2.0**-149) == 2.0**-133 + 2.0**-149
    assert one([2.0**127], [1.5], 0.0) == 1.5 * 2.0**127 and one([2.0**127], [3.0], 0.0) == float("inf")


# ---------------------------------------------------------------- operands


def digest(tensors: tuple[torch.Tensor, ...]) -> str:
    return hashlib.sha256(b"".join(x.flatten().view(torch.uint8).numpy().tobytes() for x in tensors)).hexdigest()[:16]


def test_every_machine_draws_the_same_operands() -> None:
    assert [digest(operands(instruction)) for instruction in INSTRUCTIONS] == ["89864218864fb098", "57107fa30f938012"]


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda instruction: instruction.name)
def test_operands_tell_models_apart(instruction: tensor_cores.Instruction) -> None:
    given = operands(instruction)
    assert given[2].numel() >= 100_000 and all(tensor.isfinite().all() for tensor in given)
    assert (given[2] != 0).all(), "a zero's exponent is not modelled"
    right = modelled(*given)
    for model in ALTERNATIVES:
        differ = (~same(modelled(*given, model), right)).double()
        by_family = dict(zip(FAMILY_NAMES, (part.mean().item() for part in differ.chunk(len(FAMILIES))), strict=True))
        assert differ.mean() > (0.05 if model.normalised else 0.25), (model, by_family)
        if model in (Model(24), Model(26)):
            assert by_family.pop("equal exponents") == 0.0, "nothing is cut before the sum"
            assert min(by_family.values()) > 0.04 and by_family["first product cancelled"] > 0.7, by_family


# ---------------------------------------------------------------- planted GPUs


def chain(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Products, which fp32 holds whole, added one by one in fp32."""
    for k in range(a.shape[-1]):
        c = c + a[..., :, None, k].float() * b[..., None, :, k].float()
    return c


def flipped(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """The model but for one bit of one sum."""
    d = modelled(a, b, c)
    d.view(torch.int32)[17, 5, 3] ^= 1
    return d


PLANTED = {
    "24 bits": (lambda *given: modelled(*given, Model(24)), "`24 bits, truncated` explains 100.0000%"),
    "26 bits": (lambda *given: modelled(*given, Model(26)), "`26 bits, truncated` explains 100.0000%"),
    "nearest": (lambda *given: modelled(*given, Model(nearest=True)), "`25 bits, nearest` explains 100.0000%"),
    "chain": (chain, "`all bits, nearest, 1 products at once` explains 100.0000%"),
    "one bit": (flipped, "no other model explains more"),
    "nothing stored": (lambda a, b, c: torch.full_like(c, float("nan")), "no other model explains more"),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_gpu_is_red_with_its_first_counterexample(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device, explained = PLANTED[fault]
    monkeypatch.setattr(tensor_cores, "SUMS", 1 << 10)
    monkeypatch.setattr(tensor_cores, "added", lambda instruction, *given: device(*given))
    given = operands(MMA)
    right, wrong = modelled(*given), device(*given)
    found = step_checked(MMA, FakeCuda())
    differ = ~same(right, wrong)
    assert found["status"] == Status.RED and found["share_equal"] == (~differ).double().mean().item()
    reason = found["reason"]
    assert f"{int(differ.sum())} of {10 << 10} sums differ from `25 bits, truncated`" in reason and explained in reason
    words = re.search(r"a ((?:\w{4} ){15}\w{4}), b ((?:\w{4} ){15}\w{4}), c (\w{8}) gave (\w{8}), not (\w{8})$", reason)
    a, b = (torch.tensor([[int(word, 16) << 16 for word in words[n].split()]]) for n in (1, 2))
    c, got, said = (torch.tensor([[int(words[n], 16)]]) for n in (3, 4, 5))
    a, b, c, got, said = ((x - (x >> 31 << 32)).int().view(torch.float32) for x in (a, b, c, got, said))
    assert same(modelled(a.bfloat16(), b.bfloat16(), c), said).all()
    tile, row, column = (int(number) for number in re.search(r"tile (\d+) row (\d+) column (\d+)", reason).groups())
    assert not differ.flatten()[: (tile * MMA.rows + row) * MMA.columns + column].any(), "it is the first"
    assert same(wrong[tile, row, column], got[0, 0]) and FAMILY_NAMES[tile // 8] in reason


def test_a_gpu_as_modelled_is_ok_and_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def device(instruction: tensor_cores.Instruction, *given: torch.Tensor) -> torch.Tensor:
        launched.append(instruction)
        return modelled(*given)

    monkeypatch.setattr(tensor_cores, "added", device)
    records = Records(tmp_path, {"command": "gpu"}, {"commit": "test"})
    for _ in range(2):
        tensor_cores.check_tensor_cores(records, FakeCuda())
    assert launched == [WGMMA, MMA]
    wgmma, mma = records.rows("gpu_checks")
    assert [wgmma["plan"], mma["plan"]] == ["wgmma m64n128k16", "mma.sync m16n8k16"]
    assert [wgmma["tokens"], mma["tokens"], mma["hidden_size"]] == ["64", "16", "16"]
    for row in (wgmma, mma):
        assert row["check"] == Check.TENSOR_CORE and row["config"] == "25 bits, truncated" and row["max_ulp"] == ""
        assert (row["status"], row["reason"]) == ("ok", "") and float(row["share_equal"]) == 1.0


def test_what_raises_is_a_row_and_a_lost_context_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def device(instruction: tensor_cores.Instruction, *given: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(tensor_cores, "added", device)
    records, gpu = Records(tmp_path, {"command": "gpu"}, {"commit": "test"}), FakeCuda()
    tensor_cores.check_tensor_cores(records, gpu)
    assert [row["status"] for row in records.rows("gpu_checks")] == ["failed", "failed"]
    assert records.rows("gpu_checks")[0]["reason"] == "RuntimeError: no such instruction"
    gpu.dead = True
    with pytest.raises(DeviceLost, match="a matrix instruction"):
        step_checked(MMA, gpu)


# ---------------------------------------------------------------- the kernel


def compiled() -> Iterator[dict]:
    from castpoint.harness.compiled.compile import compile_kernel

    for instruction in INSTRUCTIONS:
        constants = {"M": instruction.rows, "N": instruction.columns, "K": 16, "num_warps": instruction.warps}
        built = compile_kernel(tensor_cores.step_kernel, "sm_90", constants, {}, {"c_ptr": "fp32", "d_ptr": "fp32"})
        yield {"opcode": instruction.opcode, "ptx": built.asm["ptx"]}


def executed_sums() -> Iterator[dict]:
    """Whole numbers, whose sums are exact, through the PTX of each kernel; and on a GPU without wgmma."""
    from castpoint.harness.ptx.driver import executed

    rng = torch.Generator().manual_seed(0)
    for instruction in INSTRUCTIONS:
        a, b = (torch.randint(-8, 9, (3, size, 16), generator=rng) for size in (instruction.rows, instruction.columns))
        c = torch.randint(-999, 999, (3, instruction.rows, instruction.columns), generator=rng)
        expected = (a @ b.mT + c).float()
        a, b, c = a.bfloat16(), b.bfloat16(), c.float()
        with executed("sm_90"):
            came = tensor_cores.added(instruction, a, b, c)
        yield {"equal": [bool(same(d, expected).all()) for d in (came, modelled(a, b, c))]}
    with executed("sm_80"):
        yield {**step_checked(WGMMA, FakeCuda())}


def test_each_kernel_is_one_matrix_instruction_and_nothing_else_adds(tmp_path: Path) -> None:
    for row in in_process(compiled, cache=tmp_path):
        assert re.findall(r"\b((?:wgmma[.]mma_async|mma[.]sync)[.\w]*)", row["ptx"]) == [row["opcode"]]
        assert not re.findall(r"\b(?:add|sub|mul|fma|cvt)[.\w]*f(?:32|16x?2?)\b", row["ptx"])
        assert "bra" not in re.findall(r"^\s+(?:@\S+ )?(\w+)", row["ptx"], re.M), "no loop repeats it"


def test_the_kernels_read_and_store_where_they_should(tmp_path: Path) -> None:
    wgmma, mma, elsewhere = in_process(executed_sums, cache=tmp_path)
    assert wgmma["equal"] == mma["equal"] == [True, True]
    assert elsewhere["status"] == "failed" and "is not one wgmma" in elsewhere["reason"]
