"""What a run of `make gpu` found, in sentences: wins beside losses."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from castpoint.harness.problems import grid
from castpoint.harness.report.gpu_goals import PREFILL, break_even, goals
from castpoint.harness.report.gpu_rows import (
    DEFERRED,
    EXACT,
    FOLDED,
    LOSS,
    NOISE,
    P1,
    WIN,
    Run,
    counts,
    fused,
    in_order,
    launch_words,
    micros,
    newest,
    runs_of,
    times,
    together,
)


def sentences(folder: Path) -> list[str]:
    """The findings of the newest GPU run, cold weights; none where nothing was measured."""
    run = newest(folder)
    if run is None or not len(run.counted()):
        return []
    found = [_extremes(run), _where_it_pays(run), _own_loop(run), _cost_of_exact(run), _launches(run), _reached(run)]
    return [line for line in found if line]


def _extremes(run: Run) -> str:
    """The largest win and the largest loss beside each other, and how many there are of each."""
    rows = run.counted()

    def said(word: str, largest: bool) -> str:
        chosen = rows[rows["verdict"] == word].sort_values("speedup_p1_p50", ascending=not largest)
        if not len(chosen):
            return f"No {word} beyond the noise."
        row = chosen.iloc[0]
        p1 = run.at(row["model"], row["tokens"], row["regime"], P1)
        figures = ", ".join(times(row[f"speedup_p1_{name}"]) for name in ("p10", "p90")).replace(", ", "–")
        return (
            f"Largest {word}: {times(row['speedup_p1_p50'])} × ({figures}), `{row['arm']}` ({launch_words(row)}), "
            f"{row['model']} at {_tokens(row['tokens'])}: {micros(row['p50_us'])} µs against {micros(p1['p50_us'])}."
        )

    return (
        f"**{run.gpu}, against the best separate chain,** cold weights: {counts(rows)}. {said(WIN, True)} "
        f"{said(LOSS, False)}"
    )


def _tokens(count: float) -> str:
    return "1 token" if count == 1 else f"{count:.0f} tokens"


def _where_it_pays(run: Run) -> str:
    """Per model: numbers of tokens at which the fastest plan is a fused kernel and wins, and the others judged."""
    rows = run.counted().sort_values("p50_us", kind="stable").drop_duplicates(["model", "tokens"])
    rows = rows[rows["verdict"].isin([WIN, LOSS, NOISE])]
    said = {}
    for model in in_order(rows["model"]):
        of_model = [row for _, row in rows[rows["model"] == model].sort_values("tokens").iterrows()]
        among = [int(row["tokens"]) for row in of_model]
        pays = [int(row["tokens"]) for row in of_model if row["verdict"] == WIN and fused(row)]
        yes, no = runs_of(pays, among), runs_of([tokens for tokens in among if tokens not in pays], among)
        said[model] = "; ".join(filter(None, [yes and f"at {yes}", no and f"not at {no}"]))
    return (
        "**Where fusing pays,** by tokens, the fastest plan being a fused kernel that beats P1 beyond the noise: "
        f"{together(said)}."
        if said
        else ""
    )


def _own_loop(run: Run) -> str:
    """What is lost to the bare matmul before anything is fused."""
    table = break_even(run)
    said = [
        f"{model} {share} (break-even {needed}: {answer})"
        for model, _, _, _, share, needed, answer in table.itertuples(index=False)
    ]
    return (
        f"**Before any fusing,** at {PREFILL} tokens, the fused kernel's loop alone reaches, of the bare matmul's "
        f"speed: {', '.join(said)}."
        if said
        else ""
    )


def _cost_of_exact(run: Run) -> str:
    """Time of the fastest exact plan over that of deferred and of folded, at points that have both."""
    table = run.counted().pivot_table(index=["model", "tokens"], columns="what", values="p50_us", observed=True)
    if EXACT not in table:
        return ""
    said = []
    for group in (DEFERRED, FOLDED):
        ratio = (table[EXACT] / table[group]).dropna() if group in table else pd.Series(dtype=float)
        if len(ratio):
            model, tokens = ratio.idxmax()
            said.append(
                f"{times(ratio.median())} of `{group}`'s time in the median of {len(ratio)} points "
                f"({times(ratio.min())} to {times(ratio.max())}, the most at {model}, {_tokens(tokens)})"
            )
    return f"**To apply rstd where the model does** takes {', and '.join(said)}." if said else ""


def _launches(run: Run) -> str:
    """What an empty kernel costs, beside what the fastest plan saves at the fewest tokens."""
    launch = run.facts.get("limits", {}).get("launch", {})
    if launch.get("per_kernel_s") is None:
        return ""
    tokens = int(run.counted()["tokens"].min())
    saved = {}
    for model in in_order(run.counted()["model"]):
        own, p1 = run.own(model, tokens), run.at(model, tokens, grid.COLD, P1)
        if own is not None and p1 is not None:
            saved[model] = p1["p50_us"] - own["p50_us"]
    listed = ", ".join(f"{model} {us:+.2f}" for model, us in saved.items())
    us = launch["per_kernel_s"] * 1e6
    return (
        f"**Launches:** {us:.2f} µs a kernel inside a graph, so {2 * us:.2f} for the two that one fused kernel has "
        f"less than three separate ones. P1's time less our fastest's at {_tokens(tokens)}, µs: {listed}."
    )


def _reached(run: Run) -> str:
    answers = goals(run)["answer"].str.replace(r":.*", "", regex=True)
    order = ("stretch met", "met", "not met", "open", "not measured")
    listed = ", ".join(f"{(answers == word).sum()} {word}" for word in order if (answers == word).any())
    return f"**Goals,** set before anything was measured: of {len(answers)}, {listed}."
