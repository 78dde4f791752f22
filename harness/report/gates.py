"""Planted faults as tables: which gate sees them, what none sees, and what the tolerances of other people's tests let
pass."""

from __future__ import annotations

import pandas as pd

from castpoint.harness.report.findings import TOLERANCES
from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.runs.words import Gate, Verdict

RIGHT = "right kernel"  # the kind of what is planted nowhere


def faults_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of our own gates on what is a fault: it changes some element."""
    own = frame["gate"].isin([*Gate]) & (frame["kind"] != RIGHT)
    return frame[own & (frame["verdict"] != Verdict.SAME_FUNCTION)]


def cell(verdicts: pd.Series) -> str:
    """`all`, `none`, or how many of how many are seen; – where the gate has no row."""
    if verdicts.empty:
        return "–"
    seen = int((verdicts == Verdict.SEEN).sum())
    return {0: "none", len(verdicts): "all"}.get(seen, f"{seen} of {len(verdicts)}")


def matrix(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of fault, one column a gate, over plans; kinds that every gate answers alike share a row."""
    rows = faults_of(frame)
    gates = [gate for gate in Gate if gate in set(rows["gate"])]
    by_any = rows.groupby(["kind", "plan", "fault"], sort=False)["verdict"].agg(min).reset_index()  # seen < unseen
    found: dict[tuple[str, ...], list[str]] = {}
    for kind, of in rows.groupby("kind", sort=False):
        cells = tuple(cell(of.loc[of["gate"] == gate, "verdict"]) for gate in gates)
        cells += (cell(by_any.loc[by_any["kind"] == kind, "verdict"]),)
        alone = any(" of " in text for text in cells)
        found.setdefault((*cells, kind if alone else ""), []).append(kind)
    lines = [[", ".join(kinds), *cells[:-1]] for cells, kinds in found.items()]
    return pd.DataFrame(lines, columns=["moved boundary or planted fault", *gates, "any of them"])


def unseen(rows: pd.DataFrame) -> pd.DataFrame:
    """Fault and plan that none of these rows' gates sees -> differ: how many elements it changes, at most."""
    of = rows.assign(seen=rows["verdict"] == Verdict.SEEN).groupby(["fault", "plan"], sort=False)
    found = of.agg(seen=("seen", "any"), differ=("differ", "max"))
    return found.loc[~found["seen"], ["differ"]].reset_index()


def blind_spots(frame: pd.DataFrame) -> list[str]:
    """One line a fault that no gate sees in some plan: in which, and how many elements it changes there."""
    lines = []
    for fault, found in unseen(faults_of(frame)).groupby("fault", sort=False):
        most = int(found["differ"].max())
        what = f"up to {most:,} elements change, none beyond what is allowed" if most else "no element changes there"
        lines.append(f"- **{fault}** in {', '.join(found['plan'])}: {what}")
    return lines


def alone(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a fault: plans in which exact inputs alone, and the envelope alone, do not see it."""
    rows = faults_of(frame)
    named = {
        "exact inputs alone": rows["gate"].str.contains("product"),
        "the envelope alone": rows["gate"].str.contains("envelope"),
    }
    found = {name: unseen(rows[of]).groupby("fault", sort=False)["plan"].agg(list) for name, of in named.items()}
    table = pd.DataFrame(found).map(lambda v: few(v, rows["plan"].nunique()) if isinstance(v, list) else "–")
    order = [fault for fault in rows["fault"].unique() if fault in table.index]
    return table.loc[order].rename_axis("not seen by").reset_index()


def few(plans: list[str], every: int) -> str:
    """Up to four names, or how many."""
    if len(plans) == every:
        return "every plan"
    return ", ".join(plans) if len(plans) <= 4 else f"{len(plans)} plans"


def counted(frame: pd.DataFrame) -> tuple[int, int, int, int]:
    """Planted faults, those that no gate of ours sees; looks of these gates at right kernels, those that refuse one."""
    rows, right = faults_of(frame), frame[frame["gate"].isin([*Gate]) & (frame["kind"] == RIGHT)]
    faults, passed = len(rows[["plan", "fault"]].drop_duplicates()), len(unseen(rows))
    return faults, passed, len(right), int((right["verdict"] == Verdict.SEEN).sum())


def section(frame: pd.DataFrame) -> str:
    """Of report.md, from the rows of gates.csv."""
    every, passed, looks, refused = counted(frame)
    said = (
        f"## Which gate sees which fault\n\n**{every - passed} of {every} planted faults are seen**, by one element at least; "
        f"of {looks} looks at right kernels, which sum in other orders, {refused} are refused. Each is a plan as PyTorch "
        "runs it in fp32, with one boundary moved or one place of its code changed (`castpoint study gates`). `one product`, "
        "`many products`: the spec's bits, where no sum depends on order. `envelope`: the interval of a drawn layer. `fp32`: "
        "stored in fp32. One product comes with a residual, many with a bias, the drawn layer with both, as in the tests; "
        "binaries are checked without, and nothing is seen there of x, residual and bias."
    )
    missed = under("What each kind of inputs misses by itself:", alone(frame))
    none = f"Seen by none, {passed} of {every}:" if passed else ""
    return paragraphs(said, markdown(matrix(frame)), none, "\n".join(blind_spots(frame)), missed)


def peers_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a test of other people's, the most permissive first, and of our gates at the end."""
    ours, lines = frame["url"] == "", []
    theirs = frame[~ours].assign(passed_share=frame["chain_passed"] / frame["chain_faults"])
    rows = [theirs.sort_values("passed_share", ascending=False, kind="stable"), frame[ours]]
    for row in pd.concat(rows).itertuples(index=False):
        allowed = f"{row.atol:g} + {row.rtol:g} · abs(y)" if row.atol or row.rtol else "equal bits"
        chain = f"{100 * row.chain_passed / row.chain_faults:.2g} %, {row.chain_passed:.0f} of {row.chain_faults:.0f}"
        refused = f"{row.right_refused:.0f} of {row.right_kernels:.0f}"
        if row.url:
            hidden = f", {row.norm_hidden:.0f} hidden" if row.norm_hidden > 0 else ""
            norm = f"{row.norm_passed:.0f} of {row.norm_faults:.0f}{hidden}"
            name, inputs = f"[{row.peer}]({row.url}), {row.test}", f"x {row.x}, w {row.weight}"
        else:
            name, allowed, norm, inputs = f"{row.peer}, {row.test}", "–", "–", "–"
        lines.append([name, allowed, chain, norm, inputs, refused])
    head = ["test", "allows", "passed: q, k, v of a drawn layer", "passed: a norm by itself", "on its inputs"]
    return pd.DataFrame(lines, columns=[*head, "right kernels refused"])


def tolerances_section(frame: pd.DataFrame) -> str:
    """Of report.md, from the rows of tolerances.csv."""
    return paragraphs(
        f"## {TOLERANCES}\n\nThe same faults before the comparison that each test makes of bf16 outputs, "
        "read in its source: how many pass. First q, k and v of every plan on the drawn layer, where only the tolerance is "
        "the test's. Then a norm by itself, on the inputs that the test draws (N: mean, deviation; U: range; D: channels); "
        "`hidden`: no bit differs on those. The reference is the right kernel of the same plan; what the tests say of "
        "gradients is left out. Right kernels sum in other orders: where these are refused, equal bits are no gate.",
        markdown(peers_table(frame)),
    )
