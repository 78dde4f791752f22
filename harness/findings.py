"""What a run's numbers say, as sentences. Each is written from the numbers, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from harness.frames import Frames, best_backend, first_layer, noise_floor, over_layers, own
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
    noise, equal = noise_floor(errors), over_layers(first_layer(errors), "eager", "share_equal").get("one-rounding")
    if noise is None or equal is None:
        return
    ratio = f", about {float(f'{(1 - equal) / noise:.1g}'):,.0f} times as many" if noise else ""
    yield (
        f"**Noise floor,** first layer: eager run one token at a time changes {noise:.3%} of its own K elements. One rounding a norm "
        f"instead of two changes {1 - equal:.0%}{ratio}."
    )


def _amplified(frames: Frames) -> Iterator[str]:
    amplified, errors = frames["amplification"], frames["errors"]
    if not len(amplified):
        return
    layer = amplified["layer"].min()
    rows = amplified[(amplified["layer"] == layer) & (amplified["plan"] == "hf")].set_index("weights")
    k = errors[(errors["plan"] == "hf") & (errors["output"] == "k") & (errors["backend"] == "spec")]
    k = k[(k["reference"] == "truth") & (k["layer"] == layer)].set_index("weights")
    weights = next(iter(own(rows.reset_index())["weights"]), None)
    control = next((w for w in rows.index if w.endswith("k_norm=1")), None)
    if weights is None or control is None:
        return
    a, b = rows.loc[weights], rows.loc[control]
    yield (
        f"**A largest K-norm weight of {a['k_norm_max']:g}** (layer {layer}, `hf`, against weights of 1) multiplies K's largest absolute "
        f"error by {a['k_max_abs_after'] / b['k_max_abs_after']:.0f} ({b['k_max_abs_after']:.3g} to {a['k_max_abs_after']:.3g}), the "
        f"logits' rms error by {a['logit_rms_error'] / b['logit_rms_error']:.1f}, softmax's mean total variation by "
        f"{a['softmax_tv_mean'] / b['softmax_tv_mean']:.1f} ({b['softmax_tv_mean']:.2g} to {a['softmax_tv_mean']:.2g}), the rows whose "
        f"most attended key flips by {_ratio(a['top_key_flips'], b['top_key_flips'])} ({b['top_key_flips']:.2%} to {a['top_key_flips']:.2%})."
    )
    yield (
        f"**Relative measures** of the same two: K's p99 error {k['p99_ulp'][control]:.3g} and {k['p99_ulp'][weights]:.3g} ulp, correctly "
        f"rounded {k['share_equal'][control]:.1%} and {k['share_equal'][weights]:.1%}, K's rms error relative to its head "
        f"{b['k_rel_rms_after']:.2e} and {a['k_rel_rms_after']:.2e} (before the norm {a['k_rel_rms_before']:.2e} in both)."
    )
    uniform = next((w for w in rows.index if "k_norm=" in w and w != control), None)
    if uniform is None:
        return
    c = rows.loc[uniform]
    yield (
        f"**The same weight in every channel** ({c['k_norm_max']:g} against 1) multiplies the logits' rms error by "
        f"{c['logit_rms_error'] / b['logit_rms_error']:.4g}, K's relative error by {c['k_rel_rms_after'] / b['k_rel_rms_after']:.4g} and "
        f"softmax's mean total variation by {c['softmax_tv_mean'] / b['softmax_tv_mean']:.1f}. So the weight's size does not reach relative "
        "errors; that of the row above comes from one channel outweighing its head."
        if abs(c["k_rel_rms_after"] / b["k_rel_rms_after"] - 1) < 1e-3
        else f"**The same weight in every channel** ({c['k_norm_max']:g} against 1) multiplies K's relative error by "
        f"{c['k_rel_rms_after'] / b['k_rel_rms_after']:.4g}."
    )


def _ratio(a: float, b: float) -> str:
    return f"{a / b:.1f}" if b else "no finite factor"


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
