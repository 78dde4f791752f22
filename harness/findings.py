"""What a run's numbers say, as sentences. Each is written from the numbers, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from harness.frames import Frames, best_backend, noise_floor, over_layers
from variants.catalogue import PLANS


def findings(frames: Frames) -> list[str]:
    """Sentences in Markdown; a run that lacks the rows for one of them goes without it."""
    sentences = [*_distances(frames["errors"]), *_noise(frames["errors"])]
    return sentences + [*_amplified(frames), *_time(frames["speed"])]


def _distances(errors: pd.DataFrame) -> Iterator[str]:
    truth, eager = over_layers(errors, "truth", "rel_rms"), over_layers(errors, "eager", "share_equal")
    same_eager = [name for name in eager.index if name != "hf" and PLANS[name].plan.weight_offset == "none"]
    if "hf" not in truth or not same_eager:
        return
    best, worst, closest = truth.idxmin(), truth.idxmax(), eager[same_eager].idxmax()
    yield (
        f"**Closest to the truth:** `{best}`, K relative rms error {truth[best]:.2e}. Hugging Face's order makes "
        f"{truth['hf'] / truth[best]:.1f} times that, `{worst}` {truth[worst] / truth[best]:.1f} times. "
        f"**Closest to eager,** besides `hf` itself: `{closest}`, and even there only {eager[closest]:.0%} of K's "
        "elements equal eager's."
    )


def _noise(errors: pd.DataFrame) -> Iterator[str]:
    noise, equal = noise_floor(errors), over_layers(errors, "eager", "share_equal").get("one-rounding")
    if noise is None or equal is None:
        return
    ratio = f"{(1 - equal) / noise:,.0f} times as many" if noise else "more than eager's none"
    yield (
        f"**Noise floor:** eager run one token at a time changes {noise:.3%} of its own K elements. One rounding a norm "
        f"instead of two changes {1 - equal:.0%}, {ratio}."
    )


def _amplified(frames: Frames) -> Iterator[str]:
    amplified, errors = frames["amplification"], frames["errors"]
    if not len(amplified):
        return
    layer = amplified["layer"].min()
    rows = amplified[(amplified["layer"] == layer) & (amplified["plan"] == "hf")].set_index("weights")
    k = errors[(errors["plan"] == "hf") & (errors["output"] == "k") & (errors["backend"] == "spec")]
    k = k[(k["reference"] == "truth") & (k["layer"] == layer)].set_index("weights")
    weights, control = (next((w for w in rows.index if test(w)), None) for test in (_is_own, _is_unit))
    if weights is None or control is None:
        return
    a, b = rows.loc[weights], rows.loc[control]
    yield (
        f"**A largest K-norm weight of {a['k_norm_max']:g} amplifies** (layer {layer}, `hf`, against weights of 1) K's "
        f"largest absolute error {a['k_max_abs_after'] / b['k_max_abs_after']:.0f} times ({b['k_max_abs_after']:.3g} to "
        f"{a['k_max_abs_after']:.3g}), the logits' rms error {a['logit_rms_error'] / b['logit_rms_error']:.1f} times, "
        f"softmax's mean total variation {a['softmax_tv_mean'] / b['softmax_tv_mean']:.1f} times ({b['softmax_tv_mean']:.2g} "
        f"to {a['softmax_tv_mean']:.2g})."
    )
    yield (
        f"**It does not amplify** errors in ulps: K's p99 is {k['p99_ulp'][weights]:.3g} ulp against "
        f"{k['p99_ulp'][control]:.3g}. The most attended key flips in {a['top_key_flips']:.2%} of the rows, against "
        f"{b['top_key_flips']:.2%}. K's relative error over a head goes from {b['k_rel_rms_after']:.2e} to "
        f"{a['k_rel_rms_after']:.2e}, not because weights amplify it: one outlier makes the head's error that of one channel."
    )
    uniform = next((w for w in rows.index if "k_norm=" in w and w != control), None)
    if uniform is None:
        return
    c = rows.loc[uniform]
    yield (
        f"**The same weight in every channel** ({c['k_norm_max']:g} against 1) multiplies the logits' rms error by "
        f"{c['logit_rms_error'] / b['logit_rms_error']:.4g} and leaves K's relative error at "
        f"{c['k_rel_rms_after'] / b['k_rel_rms_after']:.4g} times; softmax's total variation grows "
        f"{c['softmax_tv_mean'] / b['softmax_tv_mean']:.1f} times only."
    )


def _is_own(weights: str) -> bool:
    return "k_norm=" not in weights


def _is_unit(weights: str) -> bool:
    return weights.endswith("k_norm=1")


def _time(speed: pd.DataFrame) -> Iterator[str]:
    timed = speed[(speed["status"] == "ok") & (speed["backend"] == best_backend(speed))] if len(speed) else speed
    if not len(timed):
        return
    tokens = int(timed["tokens"].max())
    at = timed[timed["tokens"] == tokens].set_index("plan")["p50_us"]
    sentence = f"**Time here,** {tokens} tokens: from {at.min():,.0f} µs (`{at.idxmin()}`) to {at.max():,.0f} µs (`{at.idxmax()}`)."
    if best_backend(speed) == "inductor":
        sentence += (
            " These are CPU times through Inductor. PyTorch's bf16 matmul returns bf16 on a CPU, so only plans that round "
            "proj to nearest can use it; all others run an fp32 matmul over widened operands. They rank these two matmuls "
            "on this machine, not cast plans on a GPU."
        )
    yield sentence
