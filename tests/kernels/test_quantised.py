"""Weights in Q4_0 and Q8_0 blocks: read as ggml reads them, and the chain behind them held to its spec.

The kernels are interpreted here; compiled, their PTX is run in harness/conformance/test_execute.py.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import gguf
import pytest
import torch
import triton
import triton.language as tl
from support import KERNELS, ROOT, assert_bit_equal, assert_inside, pinned_share, random_problem
from torch import Tensor

import castpoint.kernels.quantised as kernels
from castpoint.harness.problems.exact import PRODUCTS
from castpoint.harness.problems.quantised import LARGEST, drawn_quantised, exact_quantised
from castpoint.kernels.config import Config
from castpoint.kernels.plan import KEEP, RNE, RTZ, STORAGE, CastPlan
from castpoint.kernels.quantised import BLOCK_BYTES, load_weight, quantised_norm_qkv
from castpoint.variants.catalogue import PLANS
from castpoint.variants.envelope import envelope
from castpoint.variants.quantised import QuantisedProblem, dequantised, packed_of, quantised_problem
from castpoint.variants.spec import round_to, spec, with_table

FORMATS = tuple(BLOCK_BYTES)
CODECS = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
TINY = {"tokens": 5, "num_q_heads": 1, "num_kv_heads": 1, "head_dim": 32}
STEPS = Config(block_m=16, block_k=32)
FP32 = PLANS["fp32"].plan


def ran(plan: CastPlan, p: QuantisedProblem, config: Config | None = None, package: ModuleType = kernels) -> dict:
    inputs = {name: value for name, value in with_table(plan, p).inputs().items() if name != "qkv_weight"}
    words = {"format": p.format, "weight": p.weight, "config": config}
    own = package.CastPlan(**plan.choices())
    return dict(zip("qkv", package.quantised_norm_qkv(**inputs, packed=p.packed, plan=own, **words), strict=True))


@functools.cache
def exact_case(plan: CastPlan, format: str, weight: str, products: str, **more: int) -> tuple:
    problem = exact_quantised(plan, format, weight, products=products, **TINY, **more)
    return problem, spec(plan, problem).outputs()


def check_exact(
    package: ModuleType, plan: CastPlan, format: str = "q4_0", weight: str = RNE, config: Config | None = None
) -> None:
    for products in PRODUCTS:
        problem, expected = exact_case(plan, format, weight, products)
        for name, actual in ran(plan, problem, config, package).items():
            assert_bit_equal(actual=actual, expected=expected[name], what=f"{products} {name}:")


# ---------------------------------------------------------------- what the blocks hold


@triton.jit
def weights_kernel(scale_ptr, word_ptr, out_ptr, D, stride_wn, FORMAT: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    weight = load_weight(scale_ptr, word_ptr, rows, 0, rows >= 0, D, stride_wn, FORMAT, "fp32", N, K)
    tl.store(out_ptr + rows[None, :] * D + tl.arange(0, K)[:, None], weight)


def kernel_weights(packed: Tensor, format: str) -> Tensor:
    width = packed.shape[1] // BLOCK_BYTES[format] * 32
    out, step = torch.empty(len(packed), width), 4096
    views = packed.view(torch.float16), packed.view(torch.int16)
    weights_kernel[(len(packed) // step,)](*views, out, width, packed.shape[1] // 2, FORMAT=format, N=step, K=width)
    return out


@pytest.mark.parametrize("format", FORMATS)
def test_every_number_of_every_scale_is_what_gguf_says(format: str):
    """65,536 scales, subnormals, infinities and NaN among them, by 16 nibbles, each in both halves, or by 256 bytes."""
    scale = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.float16)[:, None]
    low, high = -LARGEST[format] - 1, LARGEST[format] + 1
    numbers = torch.arange(low, high).repeat(2 if format == "q4_0" else 1)
    blocks = len(numbers) // 32
    packed = packed_of(scale.expand(-1, blocks), numbers.expand(65536, -1), format)
    wanted = torch.from_numpy(gguf.dequantize(packed.numpy(), CODECS[format]))
    assert_bit_equal(actual=kernel_weights(packed, format), expected=wanted)
    assert torch.equal(dequantised(packed, format).float().nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert wanted.isnan().any() and wanted.isinf().any() and ((wanted != 0) & (wanted.abs() < 2.0**-14)).any()


@pytest.mark.parametrize("format", FORMATS)
def test_blocks_are_read_where_gguf_puts_them(format: str):
    """Drawn bytes of many rows and blocks, and what gguf's own quantiser writes."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 128, generator=rng)
    packed = torch.from_numpy(gguf.quantize(weight.numpy(), CODECS[format]))
    scale = torch.randn(4096, 4, generator=rng).to(torch.float16)
    drawn = torch.randint(-LARGEST[format] - 1, LARGEST[format] + 1, (4096, 128), generator=rng)
    for blocks in (packed, packed_of(scale, drawn, format)):
        wanted = torch.from_numpy(gguf.dequantize(blocks.numpy(), CODECS[format]))
        assert_bit_equal(actual=kernel_weights(blocks, format), expected=wanted)
        assert torch.equal(dequantised(blocks, format), wanted.double())


# ---------------------------------------------------------------- the chain behind them


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("plan", ["hf", "deferred", "bf16-statistics", "fp32-tf32x3", "gemma"])
def test_equals_the_spec_bit_for_bit(plan: str, format: str):
    """Stored as fp32, where no ulp of any step hides; `out` itself is chain.finish_head's, held in test_kernels.py."""
    check_exact(kernels, PLANS[plan].plan.replace(out=KEEP), format)


@pytest.mark.parametrize("weight", STORAGE)
@pytest.mark.parametrize("format", FORMATS)
def test_equals_the_spec_however_weights_are_held(format: str, weight: str):
    check_exact(kernels, FP32, format, weight)
    if weight == KEEP:
        check_exact(kernels, FP32, format, weight, STEPS)
    else:
        check_exact(kernels, PLANS["hf"].plan, format, weight)


def test_rounding_the_weight_shows_in_its_spec():
    """The three words are three functions on the exact problem: no net is blind to them."""
    problem, _expected = exact_case(FP32, "q8_0", KEEP, "one")
    found = [spec(FP32, quantised_problem(problem, problem.packed, "q8_0", word)).v for word in STORAGE]
    assert len(found) == 3 and all(
        (a != b).double().mean() > 0.2 for a, b in zip(found, found[1:] + found[:1], strict=True)
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("plan", "weight"), [("hf", RNE), ("deferred", RNE), ("fp32", KEEP), ("gemma", RTZ)])
def test_drawn_layers_lie_within_the_envelope(plan: str, weight: str, format: str):
    plan = PLANS[plan].plan
    base = random_problem(tokens=8, hidden_size=512, head_dim=64, weight_offset=plan.weight_offset != "none")
    problem = drawn_quantised(base, format, weight)
    allowed = envelope(plan, problem)
    assert_inside(actual=ran(plan, problem), allowed=allowed)
    assert min(pinned_share(ends) for ends in allowed.values()) > 0.87, "see PINNED of test_kernels.py"


def test_rope_bias_residual_and_strides_within_the_envelope():
    base = random_problem(tokens=17, hidden_size=160, rope=True)
    assert base.bias is not None and base.residual is not None
    wide = torch.randn(17, 320).to(torch.bfloat16)[:, ::2]
    problem = drawn_quantised(base.replace(x=wide), "q4_0")
    assert_inside(actual=ran(PLANS["hf"].plan, problem), allowed=envelope(PLANS["hf"].plan, problem))


def test_the_same_bits_as_norm_qkv_on_the_dequantised_weights():
    """One function, with one config: norm_qkv itself on W as it is read."""
    problem = drawn_quantised(random_problem(tokens=8, hidden_size=512, head_dim=64), "q4_0")
    plain = {name: getattr(problem, name) for name in problem.inputs()}
    plain["qkv_weight"] = problem.qkv_weight.to(torch.bfloat16)
    wanted = KERNELS.norm_qkv.norm_qkv(**plain, plan=PLANS["hf"].plan)
    for name, expected in zip("qkv", wanted, strict=True):
        assert_bit_equal(actual=ran(PLANS["hf"].plan, problem)[name], expected=expected, what=name)


def check_memory(package: ModuleType) -> None:
    """Around the blocks all is NaN, which even a weight that meets no channel would hand on."""
    problem, expected = exact_case(PLANS["hf"].plan, "q4_0", RNE, "one")
    rows, width = problem.packed.shape
    buffer = torch.full((3 * rows, width), 255, dtype=torch.uint8)
    view = buffer[rows : 2 * rows]
    view.copy_(problem.packed)
    inputs = vars(problem) | {"packed": view}
    for name, actual in ran(PLANS["hf"].plan, QuantisedProblem(**inputs), package=package).items():
        assert_bit_equal(actual=actual, expected=expected[name], what=name)


def test_reads_nothing_beside_the_blocks():
    check_memory(kernels)


# ---------------------------------------------------------------- wrong kernels


def exact(format: str = "q4_0", weight: str = RNE, plan: str = "hf", config: Config | None = None) -> Callable:
    return lambda package: check_exact(package, PLANS[plan].plan, format, weight, config)


SCALE = "tl.load(scale_ptr + offs, mask=mask, other=0.0)"
AS_BF16 = f"({SCALE}.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)"
WEIGHT = "scale[:, None, :] * number"
ROUNDED = f"round_to({WEIGHT}, WEIGHT)"
LOWER, UPPER = "word & 15", "(word >> 8) & 15"
FIRST, SECOND = "(word << 24) >> 24", "word >> 8"
MASK = "mask = (blocks < D // 32)"
MUTATIONS = {
    "bytes of a word exchanged": (f"tl.join({LOWER}, {UPPER})", f"tl.join({UPPER}, {LOWER})", exact()),
    "nibbles of a byte exchanged": ("tl.join(lower, upper)", "tl.join(upper, lower)", exact()),
    "nibbles of a byte side by side": ("(0, 4, 1, 3, 2)) - 8", "(0, 1, 3, 4, 2)) - 8", exact()),
    "offset 7": ("(0, 4, 1, 3, 2)) - 8", "(0, 4, 1, 3, 2)) - 7", exact()),
    "scale read as bf16": (f"{SCALE}.to(tl.float32)", AS_BF16, exact()),
    "scale of the block before": (SCALE, SCALE.replace("offs", "tl.maximum(offs - WORDS - 1, 0)"), exact()),
    "blocks of 16": ("start // 32 +", "start // 16 +", exact(config=STEPS)),
    "blocks of 16, q8_0": ("start // 32 +", "start // 16 +", exact("q8_0", config=STEPS)),
    "weights truncated": (ROUNDED, WEIGHT, exact()),
    "kept weights rounded": (ROUNDED, f"round_to({WEIGHT}, 'bf16-rne')", exact(weight=KEEP, plan="fp32")),
    "scale rounded first": (ROUNDED, ROUNDED.replace("scale", "round_to(scale, 'bf16-rne')"), exact()),
    "weights rounded twice": (ROUNDED, f"round_to(truncate_tf32({WEIGHT}), WEIGHT)", exact("q8_0")),
    "bytes unsigned": (FIRST, "word & 255", exact("q8_0")),
    "bytes of q8_0 exchanged": (f"tl.join({FIRST}, {SECOND})", f"tl.join({SECOND}, {FIRST})", exact("q8_0")),
    "blocks not masked": (MASK, "mask = (blocks >= 0)", check_memory),
}  # fmt: skip


def mutated(old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """kernels.quantised of a copy of the package with one text changed."""
    package = folder / "mutated_blocks"
    package.mkdir()
    for source in (ROOT / "kernels").glob("*.py"):
        text = source.read_text()
        if source.name == "quantised.py":
            assert text.count(old) == 1, old
            text = text.replace(old, new).replace("narrow, round_to", "narrow, round_to, truncate_tf32")
        (package / source.name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    try:
        return importlib.import_module("mutated_blocks.quantised")
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == "mutated_blocks"]:
            del sys.modules[module]


def test_an_unchanged_copy_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    copy = mutated(ROUNDED, ROUNDED, tmp_path, monkeypatch)
    assert Path(copy.__file__).is_relative_to(tmp_path)
    for net in (exact(), exact("q8_0"), exact(weight=KEEP, plan="fp32"), exact(config=STEPS), check_memory):
        net(copy)


@pytest.mark.parametrize("change", MUTATIONS)
def test_a_changed_source_is_caught(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old, new, net = MUTATIONS[change]
    with pytest.raises(AssertionError, match="differ|is NaN"):
        net(mutated(old, new, tmp_path, monkeypatch))


# ---------------------------------------------------------------- what is refused


def changed(problem: QuantisedProblem, **changes: object) -> dict:
    inputs = {name: value for name, value in problem.inputs().items() if name != "qkv_weight"}
    return inputs | {"packed": problem.packed, "format": problem.format, "plan": PLANS["hf"].plan} | changes


REFUSED = {
    "format must be one of q4_0, q8_0, not 'q4_k'": {"format": "q4_k"},
    "weight must be one of fp32, bf16-rne, bf16-rtz, not 'bf16'": {"weight": "bf16"},
    "weight='fp32' keeps 15 or 19 bits, which matmul='bf16' does not read": {"weight": KEEP},
    "scale='folded' multiplies w_in into W before": {"plan": PLANS["folded"].plan},
    "plan must be a CastPlan": {"plan": "hf"},
    "q8_0 rows of 224 weights have 238 bytes, not 126": {"format": "q8_0"},
    "weights in blocks need kernel='fused', prepass='none'": {"config": Config("split-k", splits=2)},
    "block_k a multiple of 32, not fused 16 x 16": {"config": Config(block_m=16, block_k=16)},
    "packed must be a contiguous torch.uint8 tensor": {"packed": torch.zeros(128, 126)},
    "the hidden size a multiple of 32, not \\[3, 48\\]": {"x": torch.zeros(3, 48, dtype=torch.bfloat16)},
    "do not divide into 5 heads": {"num_q_heads": 3, "num_kv_heads": 1},
    "eps must be a positive number": {"eps": 0.0},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_does_not_fit_is_refused(sentence: str):
    problem, _expected = exact_case(PLANS["hf"].plan, "q4_0", RNE, "one")
    with pytest.raises(ValueError, match=sentence):
        quantised_norm_qkv(**changed(problem, **REFUSED[sentence]))


def test_an_odd_address_is_refused():
    problem, _expected = exact_case(PLANS["hf"].plan, "q4_0", RNE, "one")
    bytes_ = torch.zeros(problem.packed.numel() + 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="even address"):
        quantised_norm_qkv(**changed(problem, packed=bytes_[1:].view(problem.packed.shape)))


def test_infinite_scales_are_no_problem_and_no_tokens_no_launch():
    problem, _expected = exact_case(PLANS["hf"].plan, "q4_0", RNE, "one")
    spoilt = problem.packed.clone()
    spoilt[0, 1] = 0x7C
    with pytest.raises(ValueError, match="qkv_weight holds NaN or infinity"):
        quantised_problem(problem, spoilt, "q4_0")
    assert quantised_norm_qkv(**changed(problem, x=problem.x[:0]))[0].shape == (0, 1, 32)


def test_what_the_matmul_reads_is_rounded_once():
    rng = torch.Generator().manual_seed(0)
    problem, _expected = exact_case(FP32, "q8_0", KEEP, "one")
    scale = torch.randn(len(problem.packed), 7, generator=rng).to(torch.float16)
    packed = packed_of(scale, torch.randint(-128, 128, (len(scale), 224), generator=rng), "q8_0")
    whole = dequantised(packed, "q8_0")
    assert torch.equal(whole.float().double(), whole), "fp32 holds every weight"
    for word in STORAGE:
        read = quantised_problem(problem, packed, "q8_0", word).qkv_weight
        assert torch.equal(read, round_to(whole.float(), word))
