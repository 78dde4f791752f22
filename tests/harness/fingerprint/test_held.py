"""A norm that is right at the deciding calls and wrong elsewhere is no plan, and one that is right everywhere is not
refused: shapes, layouts in memory, values, eps, single elements, ties, optional arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import RNA, RNZ, round_to
from castpoint.kernels.plan import RNE, RTZ
from castpoint.variants.eager import eager_norm

Norm = Callable[[Tensor, Tensor, float], Tensor]


def hf(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return eager_norm(x, w, eps, False)


def one_rounding(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), w, eps)


def norm(
    x: Tensor, w: Tensor, eps: float, *, mean: Callable[[Tensor], Tensor] = lambda x: x.pow(2).mean(-1, keepdim=True),
    normed: Callable[[Tensor], Tensor] = lambda n: round_to(n, RNE), out: Callable[[Tensor], Tensor] = lambda y: y,
) -> Tensor:  # fmt: skip
    x = x.float()
    return out(normed(x * torch.rsqrt(mean(x) + eps)) * w.float()).bfloat16()


def clamped(most: float) -> Norm:
    return lambda *a: norm(*a, normed=lambda n: round_to(n.clamp(-most, most), RNE))


def changed(x: Tensor, w: Tensor, eps: float, places: slice, factor: float) -> Tensor:
    y = hf(x, w, eps).clone()
    y.view(-1)[places] *= factor
    return y


def where(shape: Callable[[Tensor], bool], then: Norm = one_rounding) -> Norm:
    """hf, or another norm where the shape of x is such."""
    return lambda x, w, eps: then(x, w, eps) if shape(x) else hf(x, w, eps)


def rounded_squares(x: Tensor) -> Tensor:
    return round_to(x * x, RNE).mean(-1, keepdim=True)


def ignores_strides(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return hf(torch.as_strided(x, x.shape, torch.empty(x.shape, device="meta").stride()), w, eps)


def ignores_offsets(x: Tensor, w: Tensor, eps: float) -> Tensor:
    return hf(torch.as_strided(x, x.shape, x.stride(), 0), w, eps)


def aligned_only(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """As a kernel that loads 16 bytes at once from an address that it rounds down."""
    return hf(torch.as_strided(x, x.shape, x.stride(), x.storage_offset() // 8 * 8), w, eps)


def small_rows(x: Tensor, w: Tensor, eps: float) -> Tensor:
    small = x.float().pow(2).mean(-1, keepdim=True) < 1e-4
    return torch.where(small, (x.float() * eps**-0.5 * w.float()).bfloat16(), hf(x, w, eps))


def tail_dropped(x: Tensor, w: Tensor, eps: float) -> Tensor:
    y = hf(x, w, eps).clone()
    y[..., x.shape[-1] // 16 * 16 :] = 0
    return y


def eps_outside(x: Tensor, w: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + eps) * w.float()).bfloat16()


FAULTS: dict[str, tuple[str, Norm, str]] = {
    "one element of 500 is zero": ("rmsnorm", lambda *a: changed(*a, slice(None, None, 500), 0.0), "has 0 in column"),
    "one element of 500 times 1000": (
        "head_norm",
        lambda *a: changed(*a, slice(3, None, 500), 1e3),
        "where the plan has",
    ),
    "one element of 5000 is 5 ulps off": ("rmsnorm", lambda *a: changed(*a, slice(7, None, 5000), 1.04), "has "),
    "strides ignored": ("rmsnorm", ignores_strides, "so let it call contiguous() first, or refuse what is not"),
    "strides of heads ignored": ("head_norm", ignores_strides, "with heads before tokens in memory"),
    "offsets ignored": ("rmsnorm", ignores_offsets, "so let it clone() a view first, or refuse it"),
    "16 bytes loaded at once": ("rmsnorm", aligned_only, "so let it clone() a view first, or refuse it"),
    "many heads and many tokens": (
        "head_norm",
        where(lambda x: x.shape[0] * x.shape[1] > 4096),
        "with x [600, 16, 128]",
    ),
    "one token": ("rmsnorm", where(lambda x: len(x) == 1), "with x [1, 4096]"),
    "one head of one token": ("head_norm", where(lambda x: x.shape[:2] == (1, 1)), "with x [1, 1, 128]"),
    "65 to 512 tokens": ("rmsnorm", where(lambda x: 64 < len(x) <= 512), "with x [100, 6144]"),
    "7 tokens": ("rmsnorm", where(lambda x: len(x) in (7, 13)), "with x [7, 2560] "),
    "heads of 80": ("head_norm", where(lambda x: x.shape[-1] == 80), "with x [2, 8, 80]"),
    "thousands of tokens": ("rmsnorm", where(lambda x: len(x) >= 2048), "with x [2049, 128]"),
    "more than 64 heads": ("head_norm", where(lambda x: x.shape[1] > 64), "with x [9, 128, 128]"),
    "heads of 512": ("head_norm", where(lambda x: x.shape[-1] == 512), "with x [2, 1, 512]"),
    "more than 16384 channels": ("rmsnorm", where(lambda x: x.shape[-1] > 16384), "with x [2, 18432]"),
    "wide": ("rmsnorm", where(lambda x: x.shape[-1] > 8192), "with x [3, 16384]"),
    "statistics of wide rows": (
        "rmsnorm",
        where(lambda x: x.shape[-1] >= 8192, lambda *a: norm(*a, mean=rounded_squares)),
        "with x [8, 8192]",
    ),
    "the width of Qwen3 14B": ("rmsnorm", where(lambda x: x.shape[-1] == 5120), "with x [5, 5120]"),
    "channels behind a multiple of 16": ("rmsnorm", tail_dropped, "with x [6, 1001]"),
    "x clamped": ("rmsnorm", lambda x, w, eps: hf(x.clamp(-448, 448), w, eps), "with rows scaled by 2^-20 to 2^20"),
    "normed clamped": ("rmsnorm", clamped(6), "with x [5, 5120]"),
    "normed clamped where few reach": ("rmsnorm", clamped(100), "with one channel that is not zero, x [3, 16384]"),
    "normed of large heads clamped": ("head_norm", clamped(14), "with one channel that is not zero, x [17, 3, 256]"),
    "a weight clamped": ("rmsnorm", lambda x, w, eps: hf(x, w.clamp(-150, 150), eps), "with a weight 1024 times as"),
    "y saturated as in fp16": ("rmsnorm", lambda *a: hf(*a).clamp(-65504, 65504), "with a weight 1024 times as"),
    "zeros that are none": ("rmsnorm", lambda x, *a: hf(x, *a) + 1e-30 * (x == 0), "[1, 4096] 93.75% of the elements"),
    "squares in fp16": (
        "rmsnorm",
        lambda *a: norm(*a, mean=lambda x: (x * x).clamp(max=65504).mean(-1, keepdim=True)),
        "with rows scaled by 2^-20 to 2^20",
    ),
    "a fast path for small rows": ("rmsnorm", small_rows, "with x [1, 4096], eps=1e-05"),
    "small numbers flushed": ("rmsnorm", lambda x, w, eps: hf(x * (x.abs() > 1e-4), w, eps), "with "),
    "a table of eps": (
        "rmsnorm",
        lambda x, w, eps: hf(x, w, 1e-6 if 1e-6 < eps < 1e-4 else eps),
        "with x [1, 4096], eps=1e-05",
    ),
    "eps a constant": ("rmsnorm", lambda x, w, eps: hf(x, w, 1e-5), "explained if it adds 1e-05 whatever eps is"),
    "eps ignored": ("head_norm", lambda x, w, eps: hf(x, w, 0.0), "all is explained if eps is not used"),
    "eps outside of the root": ("rmsnorm", eps_outside, "all is explained if eps is added to the root, not under it"),
    "eps in the sum": (
        "rmsnorm",
        lambda x, w, eps: hf(x, w, eps / x.shape[-1]),
        "all is explained if eps is added to the sum of squares",
    ),
    "ties up": (
        "rmsnorm",
        lambda *a: norm(*a, out=lambda y: torch.where(y > 0, round_to(y, RNA), round_to(y, RNZ))),
        "ties of out",
    ),
    "weights above 50 clamped": ("rmsnorm", lambda x, w, eps: hf(x, w.clamp(-50, 50), eps), "at eps=1e-06"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_norm_that_is_wrong_somewhere_is_no_plan(name: str) -> None:
    kind, fn, reason = FAULTS[name]
    answer = identify(fn, kind)
    assert answer.status == "none" and not answer.candidates and not answer.plans and answer.nearest, answer
    assert reason in answer.reason and len(answer.reason) < 700, answer.reason


def test_one_row_of_many_that_differs_is_found() -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        y = one_rounding(x, w, eps)
        y[512:513] = hf(x[512:513], w, eps)
        return y

    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and "they gather in row 512 of 600, " in answer.reason, answer


# ---------------------------------------------------------------- right everywhere


def in_float64(x: Tensor, w: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * w.double()).bfloat16()


def rescaled(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """As kernels that keep squares from overflow."""
    wide = x.float()
    most = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    scaled = wide / most
    return (scaled * torch.rsqrt(scaled.pow(2).mean(-1, keepdim=True) + eps / most**2) * w.float()).bfloat16()


def one_after_the_other(x: Tensor) -> Tensor:
    return (x * x).cumsum(-1)[..., -1:] * (1 / x.shape[-1])


RIGHT: dict[str, tuple[str, Norm, str]] = {
    "float64": ("rmsnorm", in_float64, "one-rounding"),
    "rescaled": ("rmsnorm", rescaled, "one-rounding"),
    "a sum in fp32, one after the other": ("rmsnorm", lambda *a: norm(*a, mean=one_after_the_other), "hf"),
    "y with gaps": ("rmsnorm", lambda *a: hf(*a).mT.contiguous().mT, "hf"),
    "heads of y with gaps": ("head_norm", lambda *a: hf(*a).transpose(0, 1).contiguous().transpose(0, 1), "hf"),
    "contiguous x alone": ("rmsnorm", lambda x, w, eps: hf(_contiguous(x), w, eps), "hf"),
}


def _contiguous(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise ValueError("x must be contiguous")
    return x


@pytest.mark.parametrize("name", RIGHT)
def test_a_norm_that_is_right_is_its_plan(name: str) -> None:
    from castpoint.harness.fingerprint.answer import unmet

    kind, fn, plan = RIGHT[name]
    answer = identify(fn, kind)
    assert plan in answer.plans and not unmet(answer, plan, kind), answer
    assert unmet(answer, "hf" if plan != "hf" else "one-rounding", kind)
    assert {c["result"] for c in answer.asked if c["about"] != "memory"} == {"same"}, answer.asked
    assert "same with x: " in summary(answer) and "[1, " in summary(answer)


# Of a square of 8 bits the even neighbour of a tie is the lower one, always: there RNZ is RNE.
@pytest.mark.parametrize(
    ("boundary", "word"),
    [*((b, w) for b in ("normed", "hidden") for w in (RNA, RNZ, RTZ)), ("statistics", RNA), ("statistics", RTZ)],
)
def test_ties_are_named(boundary: str, word: str) -> None:
    """Half away from zero, which ships, and half toward zero, beside nearest even and truncation."""
    words = {"normed": RNE, "hidden": RNE, "statistics": "fp32", boundary: word}

    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        square = lambda x: round_to(x * x, words["statistics"]).mean(-1, keepdim=True)  # noqa: E731
        kept = {"normed": lambda n: round_to(n, words["normed"]), "out": lambda y: round_to(y, words["hidden"])}
        return norm(x, w, eps, mean=square, **kept)

    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified" and answer.candidates[0].items() >= words.items(), answer
    assert answer.plans == []


# ---------------------------------------------------------------- as it is called


def fused(plain: Norm, added: Norm | None) -> Callable[..., object]:
    def fn(x: Tensor, w: Tensor, eps: float, residual: Tensor | None = None) -> object:
        if residual is None:
            return plain(x, w, eps)
        if added is None:
            raise ModuleNotFoundError("No module named 'vllm'")
        return added(x + residual, w, eps), x + residual

    return fn


def test_every_path_is_asked_by_itself() -> None:
    both = identify(fused(hf, hf), "rmsnorm")
    assert both.status == "identified" and both.candidates[0]["x"] == RNE and both.plans == ["hf"], both
    assert [c for c in both.asked if c["about"] == "argument"] == [
        {"about": "argument", "what": "no optional argument", "result": "same"},
        {"about": "argument", "what": "residual", "result": "same"},
    ]
    two = identify(fused(hf, one_rounding), "rmsnorm")
    assert two.status == "none" and two.reason == (
        "two functions: with residual and no optional argument normed=fp32 against bf16-rne"
    )
    missing = identify(fused(hf, None), "rmsnorm")
    assert missing.plans == [
        "hf"
    ] and "refused with argument residual: the callable raised ModuleNotFoundError: No" in (summary(missing))
    wrong = identify(fused(hf, lambda x, w, eps: hf(x * 1.1, w, eps)), "rmsnorm")
    assert wrong.status == "none" and wrong.reason.startswith("with residual: "), wrong
    broken = identify(fused(lambda *a: one_rounding(*a)[:-1], None), "rmsnorm")
    assert broken.status == "error" and "expected [64, 256]" in broken.reason


@pytest.mark.parametrize(("width", "sizes"), [(2560, Sizes()), (4096, Sizes()), (1152, Sizes(width=1152, tokens=1))])
def test_a_kernel_that_takes_one_width_is_asked_there(width: int, sizes: Sizes) -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if x.shape[1] != width or len(x) != (sizes.tokens or len(x)):
            raise ValueError(f"hidden size must be {width}")
        return hf(x, w, eps)

    answer = identify(fn, "rmsnorm", sizes=sizes)
    assert answer.plans == ["hf"] and answer.seconds < 60, answer
    assert any(str(width) in c["what"] and c["result"] == "same" for c in answer.asked if c["about"] == "x")
    refused = [c for c in answer.asked if c["result"].startswith("refused")]
    assert refused and all(f"hidden size must be {width}" in c["result"] for c in refused)
    wrong = identify(lambda *a: hf(*a) if a[0].shape[1] == width else fn(*a) * 0, "rmsnorm", sizes=sizes)
    assert wrong.status == "identified"


def test_own_heads_and_eps_are_asked() -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if x.shape[1:] != (40, 72):
            raise ValueError("no kernel for this shape")
        return one_rounding(x, w, eps) if eps == 3e-4 else hf(x, w, eps)

    assert identify(fn, "head_norm", sizes=Sizes(head_dim=72, heads=(40,))).plans == ["hf", "separate-head-norm"]
    answer = identify(fn, "head_norm", sizes=Sizes(head_dim=72, heads=(40,), eps=3e-4))
    assert answer.status == "none" and "with eps=0.0003 " in answer.reason, answer
    assert identify(fn, "head_norm").status == "error"


# ---------------------------------------------------------------- facts


def test_batch_invariance_is_said() -> None:
    def by_count(x: Tensor, w: Tensor, eps: float) -> Tensor:
        parts = 4 if len(x) < 64 else 1  # another order of sums, an ulp of fp32
        mean = sum(p.pow(2).sum(-1, keepdim=True) for p in x.float().chunk(parts, -1)) / x.shape[-1]
        return (x.float() * torch.rsqrt(mean + eps) * w.float()).float()

    def by_place(x: Tensor, w: Tensor, eps: float) -> Tensor:
        mean = x.float().pow(2).mean(-1, keepdim=True)
        mean[::2] *= 1 + 2.0**-22
        return x.float() * torch.rsqrt(mean + eps) * w.float()

    def leaking(x: Tensor, w: Tensor, eps: float) -> Tensor:
        bad = x.isnan().any(-1)
        return hf(x, w, eps).masked_fill((bad | bad.roll(1))[..., None], float("nan"))

    said = {fn: identify(fn, "rmsnorm").facts["batch invariant"] for fn in (hf, by_count, by_place, leaking)}
    assert said[hf].startswith("yes, in 64 rows of 1024: the same bits with 1, 2, 3, 7, 8, ")
    assert said[by_count].startswith("no: a row of 1024 has other bits with 1 rows, with 2 rows, ")
    assert "place" not in said[by_count]
    assert said[by_place].startswith("no: ") and "in another place" in said[by_place]
    assert said[leaking] == "no: a row of 1024 has other bits beside rows of NaN than among 64"


def test_nan_subnormals_and_gaps_are_said() -> None:
    def flushing(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return hf(x * (x.abs() >= 2.0**-126), w, eps)

    def without_gaps(x: Tensor, w: Tensor, eps: float) -> Tensor:
        return hf(torch.as_strided(x, x.shape, (*x.stride()[:-1], 1)), w, eps)

    def hiding(x: Tensor, w: Tensor, eps: float) -> Tensor:
        y = hf(x, w, eps)
        return torch.where(y.isnan().any(-1, keepdim=True), 0, y)

    right, flushed, rows, hidden = (identify(fn, "rmsnorm") for fn in (hf, flushing, without_gaps, hiding))
    assert {a.status for a in (right, flushed, rows, hidden)} == {"identified"}
    assert right.facts["NaN in x"] == "makes its row NaN"
    assert hidden.facts["NaN in x"] == "hidden: 65536 of 65536 results are numbers"
    assert right.facts["subnormal x"] == "counts" and right.facts["gaps between channels"] == "read as they lie"
    assert flushed.facts["subnormal x"].startswith("taken for another number, 100.00% of the elements differ")
    assert rows.facts["gaps between channels"].startswith("not read as they lie, and not refused: ")
