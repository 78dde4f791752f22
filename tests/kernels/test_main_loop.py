"""The fused kernel's main loop by itself: its numbers and memory, interpreted, and that it is the same loop, compiled.

The nets take the matmul under test as an argument, since changed copies of the source must not pass them.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nets import GUARD, guarded
from support import DEVICE, NAN, ROOT, assert_bit_equal, assert_inside, laid_out, poisoned_memory
from torch import Tensor

from castpoint.harness.compiled.compile import config_binaries
from castpoint.harness.conformance.cuda import proj_bounds
from castpoint.kernels.config import Config
from castpoint.kernels.main_loop import matmul

Matmul = Callable[..., Tensor]
TILE = Config("fused", "hidden", 16, 64)
TILES = (TILE, Config("fused", "hidden", 32, 32), Config("fused", "hidden", 64, 128))
SIZES = {  # tokens, channels, heads, channels of a head: blocks of 16 to 64, steps of 32 to 128, heads of 32 and 128
    "33 tokens, 200 channels, heads of 32": (33, 200, 3, 32),
    "17 tokens, 72 channels, heads of 96": (17, 72, 2, 96),
    "one token, 40 channels, one head of 20": (1, 40, 1, 20),
    "whole tiles": (64, 128, 2, 32),
}
LAYOUTS = ("contiguous", "transposed", "every second channel")
ODD = "33 tokens, 200 channels, heads of 32"


def operands(size: str, *, whole: bool, hidden_layout: str = LAYOUTS[0], weight_layout: str = LAYOUTS[0]) -> tuple:
    """hidden, weight and head size: whole numbers up to 8, or Gaussian."""
    tokens, channels, heads, head_dim = SIZES[size]
    rng = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randint(-8, 9, shape, generator=rng) if whole else torch.randn(shape, generator=rng)
        for shape in ((tokens, channels), (heads * head_dim, channels))
    )
    hidden, weight = (value.to(DEVICE, torch.bfloat16) for value in (hidden, weight))
    return laid_out(hidden, hidden_layout), laid_out(weight, weight_layout), head_dim


def expected_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """proj of whole numbers, by integers: every sum is exact in fp32, and rounded once."""
    proj = hidden.long() @ weight.long().T
    assert proj.abs().max() < 2**24, "the test's own premise: fp32 holds every sum"
    return proj.float().to(torch.bfloat16)


# ---------------------------------------------------------------- nets


def check_whole_numbers(matmul: Matmul) -> None:
    for size, tile in itertools.product(SIZES, TILES):
        hidden, weight, head_dim = operands(size, whole=True)
        with poisoned_memory():
            actual = matmul(hidden, weight, head_dim, tile)
        assert_bit_equal(actual=actual, expected=expected_of(hidden, weight), what=f"{size}, {tile}:")


def check_drawn(matmul: Matmul) -> None:
    hidden, weight, head_dim = operands(ODD, whole=False)
    with poisoned_memory():
        actual = {"proj": matmul(hidden, weight, head_dim, TILE)}
    assert_inside(actual=actual, allowed={"proj": proj_bounds(hidden, weight)})


def check_strides(matmul: Matmul) -> None:
    for hidden_layout, weight_layout in itertools.product(LAYOUTS, LAYOUTS):
        layouts = {"hidden_layout": hidden_layout, "weight_layout": weight_layout}
        hidden, weight, head_dim = operands(ODD, whole=True, **layouts)
        actual = matmul(hidden, weight, head_dim, TILE)
        assert_bit_equal(actual=actual, expected=expected_of(hidden, weight), what=f"{layouts}:")


def check_memory(matmul: Matmul) -> None:
    """Inputs and output lie amid NaN: nothing of it is read, nothing beside the output is written."""
    for size in SIZES:
        hidden, weight, head_dim = operands(size, whole=True)
        expected = expected_of(hidden, weight)
        buffer, out = guarded(torch.full_like(expected, NAN), 1)
        actual = matmul(guarded(hidden, 1)[1], guarded(weight, 1)[1], head_dim, TILE, out=out)
        assert actual is out
        assert_bit_equal(actual=out, expected=expected, what=size)
        outside = buffer.clone()
        outside[GUARD : GUARD + len(out), GUARD : GUARD + out.shape[1]] = NAN
        assert outside.isnan().all(), f"{size}: written outside"


NETS = {net.__name__: net for net in (check_whole_numbers, check_drawn, check_strides, check_memory)}


@pytest.mark.parametrize("net", NETS)
def test_matmul_passes(net: str):
    NETS[net](matmul)


def test_rounding_shows_in_whole_numbers():
    """Premise of the nets: of the sums so many have no bf16 value, and so many lie on a tie."""
    hidden, weight, _ = operands(ODD, whole=True)
    exact, rounded = hidden.double() @ weight.double().T, expected_of(hidden, weight).double()
    step = 2.0 ** (torch.frexp(exact)[1] - 8)
    assert (exact != rounded).double().mean() > 0.2
    assert (((exact - rounded).abs() == step / 2) & (exact != 0)).double().mean() > 0.1


def test_no_tokens():
    hidden, weight, head_dim = operands(ODD, whole=True)
    assert matmul(hidden[:0], weight, head_dim, TILE).shape == (0, 96)


def test_nan_and_infinity_stay_in_their_rows():
    hidden, weight, head_dim = operands(ODD, whole=True)
    clean = matmul(hidden, weight, head_dim, TILE)
    hidden[3, 7], hidden[5, 199] = NAN, torch.inf
    proj = matmul(hidden, weight, head_dim, TILE)
    assert proj[3].isnan().all() and not proj[5].isfinite().any()
    rest = [row for row in range(33) if row not in (3, 5)]
    assert_bit_equal(actual=proj[rest], expected=clean[rest])


# ---------------------------------------------------------------- what does not fit


ERRORS = {
    "hidden of one dimension": (lambda h, w: (h[0], w, 32, TILE), "hidden must be [tokens, hidden size], not [200]"),
    "weight of other channels": (lambda h, w: (h, w[:, 1:], 32, TILE), "weight must be [rows, 200] to match hidden"),
    "rows no multiple": (lambda h, w: (h, w, 64, TILE), "weight has 96 rows, which do not divide into heads of 64"),
    "heads of nothing": (lambda h, w: (h, w, 0, TILE), "do not divide into heads of 0"),
    "hidden in fp32": (lambda h, w: (h.float(), w, 32, TILE), "hidden must be torch.bfloat16, not torch.float32"),
    "weight in fp32": (lambda h, w: (h, w.float(), 32, TILE), "weight must be torch.bfloat16, not torch.float32"),
    "weight elsewhere": (lambda h, w: (h, w.to("meta"), 32, TILE), "weight is on meta but"),
    "another kernel": (lambda h, w: (h, w, 32, Config("split-k", "hidden")), "kernel='fused' after prepass='hidden'"),
    "another prepass": (lambda h, w: (h, w, 32, Config("fused", "rstd")), "not fused after rstd 64 x 64"),
    "out too small": (lambda h, w: (h, w, 32, TILE, h[:, :96][:9]), "out must have shape [33, 96], not [9, 96]"),
    "out not contiguous": (lambda h, w: (h, w, 32, TILE, h.T[:96].new_empty(96, 33).T), "stride 1 in its last"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_said_in_one_line(case: str):
    arguments, words = ERRORS[case]
    hidden, weight, _ = operands(ODD, whole=True)
    with pytest.raises(ValueError) as error:
        matmul(*arguments(hidden, weight))
    assert words in str(error.value) and "\n" not in str(error.value)


# ---------------------------------------------------------------- changed sources

RANGE, MASK = "range(begin, end, BLOCK_K)", "mask=(offs_m < T)[:, None] & (offs_n < DH)[None, :]"
SUMS, DRAWN, STRIDES, MEMORY = NETS
CHANGES = {  # file, old text, new text, the net that must notice
    "a step short": ("chain.py", RANGE, "range(begin, end - BLOCK_K, BLOCK_K)", SUMS),
    "a step too many": ("chain.py", RANGE, "range(begin, end + 1, BLOCK_K)", ""),
    "no mask of channels": ("chain.py", "mask=(offs_k < D)[:, None] & ", "mask=", MEMORY),
    "no mask of tokens": ("main_loop.py", MASK, "mask=(offs_m >= 0)[:, None] & (offs_n < DH)[None, :]", MEMORY),
    "no mask of a head": ("main_loop.py", MASK, "mask=(offs_m < T)[:, None] & (offs_n >= 0)[None, :]", MEMORY),
    "not rounded": ("main_loop.py", 'narrow(round_to(acc, "bf16-rne"))', "narrow(acc)", SUMS),
    "truncated": ("main_loop.py", 'round_to(acc, "bf16-rne")', 'round_to(acc, "bf16-rtz")', DRAWN),
    "every head the first": ("main_loop.py", "head * DH + offs_n", "offs_n", SUMS),
    "every block the first": ("main_loop.py", ".to(tl.int64) * BLOCK_M", ".to(tl.int64) * 0", SUMS),
    "contiguous hidden": ("main_loop.py", "stride_xm, stride_xk, 0", "stride_xm, 1, 0", STRIDES),
    "contiguous weight": ("main_loop.py", "        stride_wk, PLAN", "        1, PLAN", STRIDES),
}


def changed(change: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Matmul:
    """matmul of a copy of the kernels with that change."""
    file, old, new, _net = CHANGES[change]
    package = folder / "changed_kernels"
    package.mkdir()
    for source in (ROOT / "kernels").glob("*.py"):
        text = source.read_text()
        if source.name == file:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times"
            text = text.replace(old, new)
        (package / source.name).write_text(text)
    monkeypatch.syspath_prepend(folder)
    try:
        return importlib.import_module("changed_kernels.main_loop").matmul
    finally:
        for module in [module for module in sys.modules if module.split(".")[0] == "changed_kernels"]:
            del sys.modules[module]


@pytest.mark.parametrize("change", [change for change, (*_, net) in CHANGES.items() if net])
def test_a_changed_source_is_caught(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(AssertionError, match="differ|outside"):
        NETS[CHANGES[change][3]](changed(change, tmp_path, monkeypatch))


def test_a_change_without_effect_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A step beyond D adds zeros, by the masks: it costs time and no bit, and shows that copies as such pass."""
    copy = changed("a step too many", tmp_path, monkeypatch)
    for net in NETS.values():
        net(copy)


# ---------------------------------------------------------------- compiled ahead of time

COMPILE = """
import json, re
from castpoint.harness.compiled.compile import TARGETS, compile_matmul, compile_norm_qkv
from castpoint.kernels.config import candidates
from castpoint.variants.catalogue import PLANS

hf = PLANS["hf"].plan
tiles = [c for c in candidates(4096, 1024, 32, 128) if (c.kernel, c.prepass) == ("fused", "hidden")]
for target in TARGETS:
    for tile in tiles if target == "sm_90" else tiles[1:2]:
        for compiled in (compile_matmul(target, config=tile), compile_norm_qkv(hf, target, config=tile)):
            machine = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
            words = r"(?:wgmma\\.mma_async|tcgen05\\.mma|mma\\.sync|v_mfma_\\w+|cp\\.async\\.c[ga])[.\\w:]*"
            print(json.dumps({"target": target, "tile": str(tile), "registers": compiled.registers,
                              "spills": compiled.spills, "shared": compiled.shared,
                              "loop": sorted(re.findall(words, machine))}))
"""


@pytest.fixture(scope="module")
def compiled() -> list[tuple[dict, dict]]:
    """The loop alone and the fused kernel with the same tile, compiled in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    return list(zip(rows[::2], rows[1::2], strict=True))


def test_it_is_the_fused_kernels_loop(compiled: list[tuple[dict, dict]]):
    """The same matrix instructions, as many of them, fed by as many asynchronous copies into as much shared memory."""
    assert {alone["target"] for alone, _ in compiled} == {"sm_80", "sm_90", "sm_100", "gfx942"} and len(compiled) == 7
    for alone, fused in compiled:
        name = f"{alone['tile']} on {alone['target']}"
        assert alone["loop"] and alone["loop"] == fused["loop"], name
        assert alone["shared"] == fused["shared"], name
        assert alone["target"] != "sm_90" or {word.split(".")[0] for word in alone["loop"]} == {"wgmma", "cp"}, name


def test_it_spills_nothing_and_as_many_programs_share_a_processor(compiled: list[tuple[dict, dict]]):
    """Of Hopper: 64 Ki registers, 227 KiB of shared memory. With more of them at once it would flatter the loop."""
    for alone, fused in compiled:
        if alone["registers"] is not None:
            assert alone["spills"] == 0 and alone["registers"] <= fused["registers"], alone["tile"]
        if alone["target"] == "sm_90" and alone["registers"] is not None:
            warps = int(alone["tile"].split(", ")[1].split()[0])
            first, second = (
                min(65536 // (-(-each["registers"] // 8) * 8 * 32 * warps), 227 * 1024 // each["shared"])
                for each in (alone, fused)
            )
            assert first == second > 0, alone["tile"]


def test_every_tile_is_compiled_for_every_target():
    from castpoint.harness.compiled.compile import TARGETS
    from castpoint.harness.problems.grid import Point, loop_tiles

    asked = {(target, keywords["config"]) for kernel, _, target, keywords in config_binaries() if kernel == "matmul"}
    tiles = {tile for model in ("qwen3-0.6b", "qwen3-32b") for t in (64, 4096) for tile in loop_tiles(Point(model, t))}
    assert asked == set(itertools.product(TARGETS, tiles))
