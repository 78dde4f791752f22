"""Weights in blocks against their published formats, and llama.cpp's statistics against other ways to them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from tiny_models import IDS, tiny_lm

from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.harness.runs.schema import FourBitRow
from castpoint.harness.systems import four_bit
from castpoint.harness.systems.codecs import TYPES, q4_k, through
from castpoint.harness.systems.kl_statistics import Tokens, listed
from castpoint.variants.spec import truth

RNG = torch.Generator().manual_seed(0)
WEIGHT = torch.randn(32, 512, generator=RNG) * 0.03

FP16 = 2.0**-11  # its unit roundoff


def error(kind: str, weight: torch.Tensor = WEIGHT) -> float:
    return ((through(kind, weight) - weight).norm() / weight.norm()).item()


def test_a_type_of_more_bits_errs_less() -> None:
    """A uniform grid of 2^b levels over +-2.6 deviations, the mean largest of 32: a step over sqrt(12)."""
    assert error("Q8_0") == pytest.approx(2 * 2.6 / 255 / 12**0.5, rel=0.15)
    assert error("Q4_0") == pytest.approx(2 * 2.6 / 16 / 12**0.5, rel=0.15)
    assert error("Q8_0") < error("Q4_K") < error("Q4_0")


def test_what_lies_on_the_grid_stays_there() -> None:
    for kind in TYPES:
        once = through(kind, WEIGHT)
        moved = (through(kind, once) - once).abs().max().item()
        assert moved <= 2 * FP16 * once.abs().max().item()  # the scale, and Q4_K's minimum, rounded to fp16 anew
    levels = torch.arange(-8, 8).repeat(4, 2).float() * 0.125
    assert torch.equal(through("Q4_0", levels), levels)
    whole = levels.repeat(1, 8)  # d and dmin, 63rds of the scale and the minimum, are rounded to fp16
    assert (through("Q4_K", whole) - whole).abs().max() <= FP16 * ((whole + 1) + 1).max()


def test_blocks_of_q4_k_hold_what_their_format_says() -> None:
    """Read by hand: two halves, 12 bytes of six-bit numbers, nibbles of 64 weights in 32 bytes, the low ones first."""
    blocks = q4_k(WEIGHT.numpy()).reshape(-1, 144)
    d, dmin = (blocks[:, at : at + 2].copy().view(np.float16)[:, 0].astype(np.float64) for at in (0, 2))
    packed = blocks[:, 4:16].astype(int)
    scale = np.stack(
        [packed[:, i] & 63 if i < 4 else (packed[:, 4 + i] & 15) | packed[:, i - 4] >> 6 << 4 for i in range(8)], 1
    )
    least = np.stack(
        [packed[:, 4 + i] & 63 if i < 4 else packed[:, 4 + i] >> 4 | packed[:, i] >> 6 << 4 for i in range(8)], 1
    )
    nibbles = blocks[:, 16:].reshape(-1, 4, 32)
    levels = np.stack([nibbles & 15, nibbles >> 4], 2).reshape(-1, 8, 32)
    high, low = (d[:, None] * scale)[..., None] * levels, (dmin[:, None] * least)[..., None]
    read = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K).reshape(high.shape)
    assert (abs(high - low - read) <= 3 * 2.0**-24 * (high + low)).all()  # gguf's float32: two products, a difference


def test_a_matrix_without_whole_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="320 columns are no multiple of 256, the block of Q4_K"):
        through("Q4_K", torch.ones(2, 320))


def test_a_quantised_layer_is_the_truth_where_nothing_is_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = synthetic_problem(tokens=8)
    exact = truth(problem)
    monkeypatch.setattr(four_bit, "through", lambda kind, weight: weight)
    q, k = four_bit.quantised(problem, "Q4_0", True, ("norm", "q_norm", "k_norm"))
    assert torch.equal(q, exact.q) and torch.equal(k, exact.k)


def tokens(count: int = 400) -> Tokens:
    """Of two models that say nearly the same."""
    rng = np.random.default_rng(1)
    base = rng.gamma(1.0, 2.0, count)
    nll = np.abs(base + rng.normal(0, 0.2, count))
    return Tokens(nll.tolist(), base.tolist(), rng.gamma(1.0, 0.02, count).tolist(), (rng.random(count) < 0.9).tolist())


def test_a_standard_error_is_what_drawing_the_tokens_again_gives() -> None:
    made, rng = tokens(), np.random.default_rng(2)
    columns = [np.array(each) for each in (made.nll, made.base_nll, made.kl, made.same)]
    drawn: dict[str, list[float]] = {}
    for _ in range(400):
        at = rng.integers(0, len(made.kl), len(made.kl))
        for what, (value, _) in listed(Tokens(*(each[at].tolist() for each in columns))).items():
            drawn.setdefault(what, []).append(value)
    errors = {what: error for what, (_, error) in listed(made).items() if error is not None}
    assert len(errors) == 9
    for what, error in errors.items():
        assert np.std(drawn[what]) == pytest.approx(error, rel=0.2), what


def test_statistics_of_two_tokens_by_hand() -> None:
    logits, base = (
        torch.log(torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]])),
        torch.log(torch.tensor([[0.25, 0.75]] * 3)),
    )
    made = Tokens()
    made.add(logits, base, [0, 1, 0])
    found = listed(made)
    kl = [0.25 * np.log(0.5) + 0.75 * np.log(1.5), 0.25 * np.log(0.25 / 0.9) + 0.75 * np.log(7.5)]
    assert found["Mean KLD"][0] == pytest.approx(np.mean(kl), rel=1e-6)
    assert found["Maximum Δp"][0] == pytest.approx(65, rel=1e-6) and found["Minimum Δp"][0] == pytest.approx(
        -25, rel=1e-6
    )
    assert found["Mean Δp"][0] == pytest.approx(100 * ((0.5 - 0.75) + (0.9 - 0.25)) / 2, rel=1e-6)
    assert found["Mean PPL(Q)"][0] == pytest.approx((0.5 * 0.9) ** -0.5, rel=1e-6)
    assert found["Same top p"] == (0, 0)
    assert found["Median KLD"][0] == pytest.approx(np.mean(kl), rel=1e-6)


def test_the_study_of_a_small_model_writes_every_arm_and_its_page(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    from castpoint.harness import options
    from castpoint.harness.report import four_bit as page

    records = options.records_of("four-bit", tmp_path, {}, device="cpu", model="", short=True)
    lm = tiny_lm()
    for layer, problem in enumerate(four_bit._layers(lm, IDS[:8])):
        four_bit.add_layer(records, problem.replace(model="tiny", weights="drawn", layer=layer))
    four_bit.add_model(records, lm, [IDS[:12], IDS[12:24]])
    records.finish()
    rows = records.rows("kl_statistics")
    assert {row["arm"] for row in rows} == set(four_bit.model_arms(lm))
    assert {row["status"] for row in rows if row["arm"].startswith("Q4_K")} == {"not applicable"}
    assert {row["tokens"] for row in rows if row["status"] == "ok"} == {"22"}
    count = len(rows)
    four_bit.add_model(records, lm, [IDS[:12], IDS[12:24]])
    assert len(records.rows("kl_statistics")) == count and records.has(
        FourBitRow, model="tiny", weights="drawn", layer=0, arm="hf"
    )
    text = page.page(tmp_path)
    assert "Same top p" in text and "no multiple of 256" in text and (tmp_path / "plots" / "four-bit.png").exists()
    assert "moves K" in page.headline(tmp_path)
