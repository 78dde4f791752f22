"""What happened to the authors of five reports, in at most twelve sentences, each with figures of the claims' records."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

UNLOADED, ULP = "unloaded bias", "one ulp on K"


class Figures:
    """The rows of claim_figures by what they are of and their cause; a KeyError where one was not measured."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows = rows

    def of(self, claim: str, what: str, cause: str = "") -> pd.DataFrame:
        rows = self.rows[(self.rows["claim"] == claim) & (self.rows["what"] == what)]
        rows = rows[rows["cause"].str.endswith(cause)] if cause else rows
        if not len(rows):
            raise KeyError(what)
        return rows

    def span(self, claim: str, what: str, cause: str = "") -> str:
        """`least to greatest` over all of them."""
        rows = self.of(claim, what, cause)
        low, high = (f"{value:.3g}" for value in (rows["measured_low"].min(), rows["measured_high"].max()))
        return low if low == high else f"{low} to {high}"

    def most(self, claim: str, what: str, cause: str = "") -> str:
        return f"{self.of(claim, what, cause)['measured_high'].max():.2g}"


def story(figures: pd.DataFrame) -> str:
    """The sentences whose figures were measured, a paragraph a report; empty without any."""
    f, told = Figures(figures), []
    for sentences in (tensor_parallel(f), jax(f), kernel(f)):
        said = []
        try:
            said.extend(sentences)
        except KeyError:  # a run of some claims alone tells up to the first that it lacks
            pass
        told.append(" ".join(said))
    return "\n\n".join(filter(None, told))


def tensor_parallel(f: Figures) -> Iterator[str]:
    """Reports 000 to 002."""
    logits, behind = "logits, largest", "first layer's output projection"
    yield (
        f"**000 to 002.** An output projection whose bias no tensor of the checkpoint fills differs by "
        f"{f.span('A2', behind, UNLOADED)} right behind it, where the report prints 0.033369, and its logits by "
        f"{f.span('A2', logits, UNLOADED)} over prompts and draws, where the reports say 14.31 to 17.95."
    )
    yield (
        f"The cause that was given, a float32 ulp on K, moves logits by {f.span('A2', logits, ULP)} with all that is "
        "rounded anew behind it."
    )
    yield (
        f"Of the same draw float64 changes {f.most('A3', 'what float64 changes of a draw')} at most; a new draw, as every "
        f"process makes one, gives {f.span('A4', logits, UNLOADED)}, and that is what changed from run to run."
    )
    yield (
        f"Not explained on these weights: 750 to 900 behind layer 3 (here {f.span('A5', 'behind layer 3', UNLOADED)}), and "
        f"23.31 before q's, k's and v's biases were loaded "
        f"({f.span('A2', 'logits, largest, before the biases were loaded')} without them)."
    )


def jax(f: Figures) -> Iterator[str]:
    """Report 003."""
    norm, output = "largest difference of a layer's RMSNorm", "layer 0's attention output"
    yield (
        f"**003.** Which root an RMSNorm is written with hardly matters while its statistics are float32 (at most "
        f"{f.most('B1', norm, 'fp32 statistics')} apart), and in bf16 none helps ({f.most('B1', norm, 'all in bf16')})."
    )
    yield (
        f"A chain of casts through float16 moves layer 0's attention output by {f.most('B2', output, 'float16 chain')}; "
        f"rounding to bf16 alone makes {f.span('B2', 'logits', 'rounding to bf16')} of logits on models of this size, and "
        "0.14 to 3.32 needs no other cause."
    )
    yield (
        f"Logits agree to {f.most('B3', 'logits', 'fp32')} in float32, so not to 1e-6; float64 does, given PyTorch's own "
        f"angles ({f.most('B3', 'logits', 'angles')})."
    )


def kernel(f: Figures) -> Iterator[str]:
    """Report 004."""
    yield (
        f"**004.** A K-norm weight multiplies a value and its error alike: the relative error grows "
        f"{f.span('C3', 'relative error, times')} times, under 96.5 too."
    )
    yield (
        f"So no text becomes gibberish by it: plan fp32 stands {f.span('C4', 'KL from eager, mean of a text', 'own weights: fp32')} "
        f"nats from eager, and eager token by token "
        f"{f.span('C4', 'KL of eager, token by token, from eager', 'own weights: eager')} from itself."
    )
    yield (
        f"Casting before the matmul alone leaves {f.span('C5', unequal('bf16-operand'))} of K's elements unequal to PyTorch's, "
        f"and casting after it {f.span('C5', unequal('cast-after-matmul'))}: equal bits take every rounding of PyTorch's."
    )
    outside, inside = (f"largest gain of a channel, K norm {place}" for place in ("outside", "inside"))
    yield (
        f"A K norm outside the kernel has the same gain ({f.span('C7', outside)}, inside {f.span('C7', inside)}), since it is "
        "the norm that has it."
    )
    bytes_read = "GB/s that 400 tokens/s read"
    yield (
        f"llama.cpp's 4 bits move K by {f.span('C8', 'K' + error('Q4_0'))} of itself, plans by {f.span('C8', 'K' + error('hf'))} "
        f"and less, and 400 tokens/s need {f.span('C8', bytes_read, 'bf16')} GB/s in bf16: its norms round nothing, and that "
        "is what it does right."
    )


def unequal(plan: str) -> str:
    return f"K unequal to PyTorch's: {plan}"


def error(arm: str) -> str:
    return f"'s relative error: {arm}"
