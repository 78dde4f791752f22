"""The error budget as tables, from the rows of accuracy.budget as a data frame.

Rows of kernels are kept out of every mean: they are no part of a plan's error.
"""

from __future__ import annotations

import pandas as pd

from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.runs.words import FP32, MEASURES, ORDER_OF_SUMS, PLAYERS, Status
from castpoint.kernels.plan import ROPE_BOUNDARIES

OUT = {"out": "out, the store"}  # where it is not one word among others
LABELS = {"scale": "W·w_in folded", "matmul": "operand cut to tf32", "weight_offset": "1 + w"}  # players: choices
WHOSE = {"k_rel_ms": "K", "logit_ms": "logits"}  # squared error


def mean_shares(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """Plan x player: share of the plan's squared error, mean over layers, each counting alike; NaN: no player of it.

    Plans in falling order of their total (its mean over layers), players in the order of the chain, then fp32.
    """
    rows = _parts(frame, measure)
    shares = rows.pivot_table(index="plan", columns="player", values="share", aggfunc="mean")
    order = rows.groupby("plan")["total"].mean().sort_values(ascending=False, kind="stable").index
    return shares.loc[order, [player for player in (*PLAYERS, FP32) if player in shares.columns]]


def root_totals(frame: pd.DataFrame, measure: str, rotated: bool = False) -> pd.Series:
    """Plan -> rms error, over layers."""
    return _parts(frame, measure, rotated).groupby("plan")["total"].mean() ** 0.5


def share_table(frame: pd.DataFrame, measure: str) -> pd.DataFrame:
    """One row a plan: its rms error (K's relative to its head) and the part of its square that each rounding makes."""
    shares = mean_shares(frame, measure)
    table = shares.map(_percent).rename(columns=LABELS | OUT)
    table.insert(0, f"{WHOSE[measure]}: rms error", root_totals(frame, measure).reindex(table.index))
    return table.rename_axis("plan").reset_index()


def section(frame: pd.DataFrame) -> str:
    """Of report.md: the parts of K's and the logits' squared errors, and RoPE's."""
    rows = _parts(frame, MEASURES[0])
    words, tables = "", []
    if len(rows):
        layers = sorted(rows["layer"].unique())
        where = f"layer {layers[0]}" if len(layers) == 1 else f"mean of {len(layers)} layers"
        words = (
            "Which rounding makes how much of a plan's squared error: Shapley shares "
            f"({where}, {rows['tokens'].iloc[0]} tokens). A share below 0: that rounding cancels more of the others' "
            f"error than it adds, or is noise.{_kernels(frame)}"
        )
        tables = [markdown(share_table(frame, measure)) for measure in MEASURES]
    return paragraphs("## Error budget", words, *tables, rope_table(frame), "![error budget](plots/budget.png)")


def _kernels(frame: pd.DataFrame) -> str:
    """A sentence on the largest kernel_vs_spec_share; empty where no kernel was measured."""
    rows = frame[(frame["player"] == ORDER_OF_SUMS) & (frame["status"] == Status.OK)]
    if not len(rows):
        return ""
    worst = rows.loc[rows["kernel_vs_spec_share"].idxmax()]
    return (
        f" Order of sums comes on top: at most {worst['kernel_vs_spec_share']:.1g} of a plan's squared error, of this "
        f"machine (`{worst['plan']}`, {WHOSE[worst['measure']]}, layer {worst['layer']}, {worst['tokens']} tokens)."
    )


def _percent(share: float) -> str:
    return "–" if pd.isna(share) else f"{share:.0%}".replace("-0%", "0%")


def _parts(frame: pd.DataFrame, measure: str, rotated: bool = False) -> pd.DataFrame:
    return frame[(frame["measure"] == measure) & frame["shapley"].notna() & (frame["rotated_from"].notna() == rotated)]


# ---------------------------------------------------------------- RoPE


def rope_shares(frame: pd.DataFrame, measure: str = MEASURES[0]) -> pd.DataFrame:
    """Plan -> `before` and `behind`, rms error of measure (K's relative to its head) without RoPE and with it on the
    same layers; and the share of the squared error behind that each of RoPE's boundaries makes which any plan
    rounds, NaN: not rounded.

    Plans in falling order of the error behind; empty where no rotated problem was measured. A rotation keeps the
    size of a head, so that K's two errors compare; logits are those of rotated q and k.
    """
    rows = _parts(frame, measure, rotated=True)
    same = frame[frame["layer"].isin(rows["layer"])]
    errors = {"before": root_totals(same, measure), "behind": root_totals(same, measure, rotated=True)}
    shares = rows.pivot_table(index="plan", columns="player", values="share", aggfunc="mean")
    table = pd.DataFrame(errors).dropna().join(shares[[name for name in ROPE_BOUNDARIES if name in shares.columns]])
    return table.sort_values("behind", ascending=False)


def rope_table(frame: pd.DataFrame) -> str:
    """rope_shares of both measures as a Markdown table; empty where none was measured."""
    k, logits = (rope_shares(frame, measure) for measure in MEASURES)
    both = {"K": k, "logits": logits}.items()
    errors = {f"{name} {at}": rows[at].map("{:.3g}".format) for name, rows in both for at in ("before", "behind")}
    table = pd.DataFrame(errors, k.index).join(
        k.drop(columns=["before", "behind"]).map(_percent).add_prefix("of its square: ")
    )
    words = (
        "Rms errors without RoPE and behind it, K's relative to its head, and the parts of K's squared error behind it:"
    )
    return under(words, table.rename_axis("plan").reset_index())
