"""Captures of chains whose q and k were recorded after RoPE."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from commands import failure
from safetensors.torch import save_file

from castpoint.harness.fingerprint.capture import Chain, read
from castpoint.harness.fingerprint.captured import explain, holds
from castpoint.harness.fingerprint.known import recorded_chain
from castpoint.kernels.plan import KEEP, CastPlan
from castpoint.variants.catalogue import plan_named
from castpoint.variants.spec import spec

HF = plan_named("hf")


def turned(plan: CastPlan, tokens: int, table: torch.dtype = torch.float32) -> Chain:
    """The plan's spec on a cut of Qwen3-0.6B's layer, with a table of angles that no theta has."""
    positions = 100 + 7 * torch.arange(tokens)
    angles = 2 * torch.pi * torch.rand(int(positions.max()) + 1, 64, generator=torch.Generator().manual_seed(0))
    cache = torch.cat([angles.cos(), angles.sin()], dim=1).to(table)
    problem = recorded_chain(HF, tokens).problem.replace(positions=positions, cos_sin_cache=cache, theta=1.0)
    return Chain(problem, {name: value.bfloat16() for name, value in spec(plan, problem).outputs().items()})


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16])
def test_rotated_heads_are_held_to_the_plan_and_its_rotation(table: torch.dtype) -> None:
    answer = explain(turned(HF, 64, table))
    own = {name: getattr(HF, name) for name in ("unrotated", "products")}
    assert "hf" in answer.plans and all(holds(words, own) for words in answer.candidates), answer
    other = explain(turned(HF.replace(unrotated=KEEP, products=KEEP), 64, table))
    assert "hf" not in other.plans and other.candidates, other
    assert all(words["unrotated"] == words["products"] == KEEP for words in other.candidates), other.candidates


def test_heads_rotated_by_another_position_are_no_plan_s() -> None:
    chain = turned(HF, 16)
    moved = chain.problem.replace(positions=chain.problem.positions - 1)
    answer = explain(Chain(moved, chain.outputs))
    assert answer.status == "none" and answer.reason.rpartition("the first: ")[2].startswith("q at token 0"), answer


def test_a_rotated_capture_is_read_and_refused_by_halves(capsys, monkeypatch, tmp_path: Path) -> None:
    chain = turned(HF, 8)
    p, path = chain.problem, tmp_path / "rotated.safetensors"
    names = ("x", "norm_weight", "qkv_weight", "q_norm_weight", "k_norm_weight", "positions", "cos_sin_cache")
    tensors = {name: getattr(p, name).contiguous() for name in names}
    tensors |= {name: value.contiguous() for name, value in chain.outputs.items()}
    for position in (torch.int64, torch.int32):
        tensors["positions"] = p.positions.to(position)
        save_file(tensors, path, metadata={"eps": str(p.eps)})
        assert torch.equal(read(path).problem.positions, p.positions)
    for change, said in (
        ({"positions": p.positions.float()}, "positions is float32, expected int64 or int32"),
        ({"positions": p.positions + 10_000}, "positions must lie in 0 to"),
        ({"positions": None}, "holds one of positions and cos_sin_cache"),
    ):
        changed = {name: value for name, value in (tensors | change).items() if value is not None}
        save_file(changed, path, metadata={"eps": str(p.eps)})
        assert said in failure(capsys, monkeypatch, "identify", "--capture", str(path))
