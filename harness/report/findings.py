"""What a run's numbers say, as sentences. Each is written from the numbers, whatever they are."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from castpoint.harness.runs.frames import Frames, best_backend, first_layer, noise_floor, over_layers
from castpoint.variants.catalogue import PLANS


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
    further = "" if worst == "hf" else f", `{worst}` {truth[worst] / truth[best]:.1f} times"
    yield (
        f"**Closest to the truth:** `{best}`, K relative rms error {truth[best]:.2e}. Hugging Face's order makes "
        f"{truth['hf'] / truth[best]:.1f} times that{further}. **Closest to eager,** of the other plans for weights stored as w: "
        f"`{closest}`, of whose K elements {eager[closest]:.0%} equal eager's."
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
    """From the draws of the first layer: ratios of two measures of one seed, then their median and range."""
    draws = frames["draws"]
    draws = draws[draws["status"] == "ok"]
    if not len(draws):
        return
    calibrated, ones, uniform = (rows.set_index("seed") for rows in _by_control(draws))
    layer, plan = draws["layer"].iloc[0], draws["plan"].iloc[0]

    def ratio(column: str, above: pd.DataFrame = calibrated) -> str:
        return _spread(above[column] / ones[column])

    yield (
        f"**A largest K-norm weight of {calibrated['k_norm_max'].iloc[0]:g}** (layer {layer}, `{plan}`, against weights of 1; median of "
        f"{len(ones)} draws, least to greatest) multiplies K's largest absolute error by {ratio('k_max_abs_after')}, the logits' rms "
        f"error by {ratio('logit_rms_error')}, softmax's mean total variation by {ratio('softmax_tv_mean')}. Rows whose most attended "
        f"key flips: {_spread(100 * calibrated['top_key_flips'])} %, with weights of 1 {_spread(100 * ones['top_key_flips'])} %."
    )
    yield (
        f"**The same weight in every channel** ({uniform['k_norm_max'].iloc[0]:g} against 1) multiplies the logits' rms error by "
        f"{ratio('logit_rms_error', uniform)}, and softmax's mean total variation by {ratio('softmax_tv_mean', uniform)}."
    )
    yield from _relative(frames)


def _by_control(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """Rows of the weights under study, of K-norm weights of 1, and of another number in every channel."""
    uniform = frame["uniform_k_norm"]
    return [frame[uniform.isna()], frame[uniform == 1], frame[uniform > 1]]


def _relative(frames: Frames) -> Iterator[str]:
    """Measures that the size of a weight should not reach, of the run's own draw."""
    amplified, errors = frames["amplification"], frames["errors"]
    layer = amplified["layer"].min()
    rows = amplified[(amplified["layer"] == layer) & (amplified["plan"] == "hf")]
    k = errors[(errors["plan"] == "hf") & (errors["output"] == "k") & (errors["backend"] == "spec")]
    k = k[(k["reference"] == "truth") & (k["layer"] == layer)].set_index("weights")
    if len(rows) < 3:
        return
    mine, ones, uniform = (of["weights"].iloc[0] for of in _by_control(rows))
    rows = rows.set_index("weights")
    p99, equal, relative = k["p99_ulp"], k["share_equal"], rows["k_rel_rms_after"]
    yield (
        f"**Relative measures** of K behind its norm, weights of 1, of {rows['k_norm_max'][uniform]:g}, and the drawn ones: p99 error "
        f"{p99[ones]:.3g}, {p99[uniform]:.3g} and {p99[mine]:.3g} ulp, correctly rounded {equal[ones]:.1%}, {equal[uniform]:.1%} and "
        f"{equal[mine]:.1%}, rms error relative to its head {relative[ones]:.2e}, {relative[uniform]:.2e} and {relative[mine]:.2e}: not the "
        "size of the weights reaches these, but one channel that outweighs its head."
        if abs(relative[uniform] / relative[ones] - 1) < 1e-3
        else f"**Relative measures** of K behind its norm: rms error relative to its head {relative[ones]:.2e} with weights of 1, "
        f"{relative[uniform]:.2e} with {rows['k_norm_max'][uniform]:g}, {relative[mine]:.2e} with the drawn ones."
    )


def _spread(values: pd.Series) -> str:
    """`81 (57 to 123)`: the median, the least and the greatest; one number where they agree."""
    low, middle, high = (f"{v:.2g}" if v < 100 else f"{v:.0f}" for v in values.quantile([0, 0.5, 1]))
    return middle if low == high else f"{middle} ({low} to {high})"


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
