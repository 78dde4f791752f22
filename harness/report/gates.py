"""Planted faults as tables: which gate sees them, what none sees, and what the tolerances of other people's tests let
pass."""

from __future__ import annotations

import pandas as pd

from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.runs.schema import Gate, Verdict

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


def section(frame: pd.DataFrame) -> str:
    """Of report.md, from the rows of gates.csv."""
    rows, right = faults_of(frame), frame[frame["gate"].isin([*Gate]) & (frame["kind"] == RIGHT)]
    faults = rows[["plan", "fault"]].drop_duplicates()
    refused = int((right["verdict"] == Verdict.SEEN).sum())
    said = (
        "## Which gate sees which fault\n\nEvery plan as PyTorch runs it in fp32, wrong in one place at a time: "
        f"{len(faults)} kernels, put before each gate (`castpoint study gates`). A gate sees a fault by one element. "
        "`one product`, `many products`: bits equal to the spec's where no sum depends on order. `envelope`: the interval "
        "of a drawn layer, with a residual and a bias. `fp32`: outputs stored in fp32. "
        f"Of {len(right)} looks at a right kernel, in four orders of summation, {refused} were refused."
    )
    spots, missed = blind_spots(frame), alone(frame)
    none = f"Seen by none, {len(unseen(rows))} of {len(faults)}:" if spots else "Each is seen by one gate at least."
    apart = under("What each kind of inputs misses by itself:", missed)
    return paragraphs(said, markdown(matrix(frame)), none, "\n".join(spots), apart)


def share(passed: float, of: float) -> str:
    """`13 of 18`, or – where nothing was tried."""
    return "–" if pd.isna(of) else f"{passed:.0f} of {of:.0f}"


def peers_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a test of other people's, and of our gates at the end."""
    lines = []
    for row in frame.itertuples(index=False):
        allowed = f"{row.atol:g} + {row.rtol:g} · abs(y)" if row.atol or row.rtol else "equal bits"
        allowed = "–" if pd.isna(row.atol) else allowed
        inputs = f"x {row.x}; w {row.weight}" if row.x else "–"
        name = f"[{row.peer}]({row.url}), {row.test}" if row.url else f"{row.peer}, {row.test}"
        norm, chain = share(row.norm_passed, row.norm_faults), share(row.chain_passed, row.chain_faults)
        lines.append([name, allowed, inputs, norm, chain, share(row.right_refused, row.right_kernels)])
    head = ["test", "allows", "its inputs", "passed: one norm, its inputs", "passed: q, k, v of a drawn layer"]
    return pd.DataFrame(lines, columns=[*head, "right kernels refused"])


def tolerances_section(frame: pd.DataFrame) -> str:
    """Of report.md, from the rows of tolerances.csv."""
    peers = frame[frame["url"] != ""]
    common = set.intersection(*({*words.split("; ")} for words in peers["passed"] if words))
    common_words = ", ".join(word for word in peers["passed"].iloc[0].split("; ") if word in common)
    return paragraphs(
        "## What other people's tests let pass\n\nThe same faults before the comparison that each test makes, read in its "
        "source, for bf16 outputs: faults that pass, of those planted. First in a norm by itself on the inputs that the "
        "test draws (N: mean, deviation; U: range; D: channels), then in q, k and v of every plan on the drawn layer, "
        "where only the tolerance is the test's. The reference is the right kernel of the same plan; gradients are left "
        "out. Right kernels: the same plans in other orders of summation; equal bits are no gate where these differ.",
        markdown(peers_table(frame)),
        f"In a norm by itself all that let any pass let pass: {common_words}." if common else "",
    )
