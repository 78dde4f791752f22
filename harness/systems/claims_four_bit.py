"""Claim C8: that llama.cpp is not affected, because its weights have 4 bits and its norm weights stay whole."""

from __future__ import annotations

from collections.abc import Callable

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.problems.geometry import geometry_named
from castpoint.harness.runs.words import Judged
from castpoint.harness.systems.claims_kernels import GEMMA, conditions, figures, over
from castpoint.harness.systems.codecs import TYPES
from castpoint.harness.systems.found import Figure, Found, span
from castpoint.harness.systems.four_bit import K_NORM, layer_arms
from castpoint.variants.problem import Problem
from castpoint.variants.spec import truth

# Qwen3-0.6B's published shape beyond its attention: the head is the embedding, read once a token.
VOCABULARY, INTERMEDIATE, HIDDEN = 151936, 3072, 1024
SAID = 400.0  # tokens/s
CARDS = {"RTX 3090": (936.0, 531.0), "RTX 5090": (1792.0, 1036.0)}  # GB/s; tokens/s reported of bf16 megakernels there
PLANS = ("hf", "cast-after-matmul", "fp32", "truncating")


def parameters() -> int:
    """Weights of Qwen3-0.6B's matrices, all of which a token reads."""
    g = geometry_named("qwen3-0.6b")
    layer = g.rows * HIDDEN + HIDDEN * g.projections["q"] + 3 * HIDDEN * INTERMEDIATE
    return g.num_layers * layer + VOCABULARY * HIDDEN


def bandwidth(bits: float) -> float:
    """GB/s that 400 tokens/s read at so many bits a weight, at T = 1 and without a cache."""
    return parameters() * bits / 8 * SAID / 1e9


def _in_a_layer(problem: Problem) -> dict[str, float]:
    exact, arms, found = truth(problem), layer_arms(problem), {}
    for arm in (*PLANS, "Q8_0", "Q4_0", f"Q8_0{K_NORM}", f"Q4_0{K_NORM}"):
        found[f"K's relative error: {arm}"] = error_stats(actual=arms[arm]()[1], reference=exact.k).rel_rms
    return found


def c8(short: bool) -> Found:
    """llama.cpp is not affected because of 4-bit weights and whole norm weights; its 400 tokens/s come from 4 bits."""
    found = over(short, _in_a_layer)

    def of(arm: str) -> list[float]:
        return [v for (name, _), values in found.items() if name == f"K's relative error: {arm}" for v in values]

    worst = [max(each) for each in zip(*(of(plan) for plan in PLANS), strict=True)]
    times = [four / plan for four, plan in zip(of("Q4_0"), worst, strict=True)]
    norm = [quantised / plan for quantised, plan in zip(of(f"Q4_0{K_NORM}"), worst, strict=True)]
    in_bf16, in_4 = bandwidth(16), bandwidth(TYPES["Q4_0"])
    needed = in_bf16 > min(card for card, _ in CARDS.values())
    cards = "; ".join(f"{name} {band:,.0f} GB/s, {rate:,.0f} tokens/s in bf16" for name, (band, rate) in CARDS.items())
    return Found(
        Judged.REPRODUCED if max(times) < 1 and needed else Judged.OTHERWISE,
        f"4-bit weights move K {span(times)} times as far as the worst of these plans; a K norm in 4 bits alone {span(norm)} "
        f"times, so whole norm weights matter. It is unaffected as it rounds nothing between x and K. 400 tokens/s read "
        f"{in_bf16:,.0f} GB/s in bf16, {in_4:,.0f} in Q4_0: 4 bits are not needed for it ({cards}, by report)",
        "K of a layer in float64 with quantised QKV weights, or a quantised K norm, beside specs of plans; bytes of all "
        "matrices a token",
        conditions(short) + f"; no speed was measured; {GEMMA}'s q and k lie on a grid of 5 bits already",
        (
            *figures(found, {}),
            Figure("GB/s that 400 tokens/s read", "bf16", [in_bf16], (), "GB/s"),
            *(
                Figure("GB/s that 400 tokens/s read", kind, [bandwidth(bits)], (), "GB/s")
                for kind, bits in TYPES.items()
            ),
        ),
        "llama-bench beside castpoint gpu",
    )


MEASURES: dict[str, Callable[..., Found]] = {"C8": c8}
