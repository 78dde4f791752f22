"""Tables and sentences of the studies beside the bench: fingerprints, error budget, cases, audit.

Each is taken from the newest finished run of a results folder that has such rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

from castpoint.harness.report import gpu as gpu_report
from castpoint.harness.report import gpu_findings
from castpoint.harness.report import model as impact_report
from castpoint.harness.report.budget import largest_share_sentence, rope_sentence, rope_table
from castpoint.harness.report.markdown import markdown
from castpoint.harness.runs.frames import latest
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.schema import Check

# Words of a fingerprint that need no mention.
USUAL = {"weight_offset": "none", "eps": "float32", "root": "rsqrt", "order": "(x*rstd)*w", "scale": "prologue"}


def answer_words(plan: str) -> str:
    """A fingerprint's candidates in words: what is rounded, what is unusual, and what was left open."""
    candidates = json.loads(plan) if plan else []
    if not candidates:
        return ""
    common = {name: word for name, word in candidates[0].items() if all(c[name] == word for c in candidates)}
    places = [name for name in common if name not in USUAL]
    cut = {"bf16-rne": "", "bf16-rtz": " (truncated)"}
    rounded = [name + cut[common[name]] for name in places if common[name] in cut]
    other = [f"{name} {common[name]}" for name in USUAL if name in common and common[name] != USUAL[name]]
    other = [
        {"weight_offset fp32": "1 + w in fp32", "weight_offset bf16-rne": "1 + w in bf16"}.get(o, o) for o in other
    ]
    left = [name for name in candidates[0] if name not in common]
    other += [f"{name} {' **or** '.join(dict.fromkeys(c[name] for c in candidates))}" for name in left]
    return "; ".join([", ".join(rounded) or "nothing", *other])


def implementation_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an implementation."""
    return pd.DataFrame(
        {
            "implementation": frame["implementation"],
            "kind": frame["kind"],
            "how": frame["how"],
            "answer": frame["status"],
            "rounds to bf16": [
                f"nearest: {answer_words(plan)}" if status == "none" else answer_words(plan)
                for plan, status in zip(frame["plan"], frame["status"], strict=True)
            ],
            "share explained": frame["share_equal"],
            "best rejected plan's share": frame["runner_up_share_equal"],
            "versions": frame["versions"],
        }
    )


def implementation_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an answer: which implementations gave it."""
    rows = implementation_rows(frame)
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in rows.itertuples(index=False):
        name = row.implementation + (" (head norm)" if row.kind == "head_norm" else "")
        how = row.how.replace("torch.compile, emulate_precision_casts", "compiled, casts emulated")
        how = how.replace("torch.compile", "compiled")
        groups.setdefault((row[4], row.answer), {}).setdefault(name, []).append(how)
    lines = []
    for (rounds, answer), members in groups.items():
        by_how: dict[str, list[str]] = {}
        for name, ways in members.items():
            by_how.setdefault("; ".join(ways), []).append(name)
        text = " · ".join(f"{', '.join(names)} ({ways})" for ways, names in by_how.items())
        lines.append({"rounds to bf16": rounds or "–", "answer": answer, "implementations": text})
    return pd.DataFrame(lines)


THAT, SAME_BITS, OPEN, ANOTHER = "that plan", "with one of the same bits", "that plan, fp32 steps open", "another plan"


def outcome(row: tuple) -> str:
    """What a row of fingerprints.csv answered to the planted plan. `with one of the same bits`: it is named together with
    words that store the same on every row searched. `fp32 steps open`: every candidate is that plan, and they differ in
    eps, root or order, which no plan fixes."""
    planted, answered = json.loads(row.planted), json.loads(row.answered)
    if row.status in ("none", "error"):
        return row.status
    if all(planted.items() <= words.items() for words in answered):
        return THAT if row.status == "identified" else OPEN
    among = any(all(word in words[name].split(" or ") for name, word in planted.items()) for words in answered)
    if not among:
        return ANOTHER
    return SAME_BITS if row.status == "identified" else "undecided"


def confusion_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of subject: how many were answered with the planted plan, left open, or answered with another."""
    found = pd.Series([outcome(row) for row in frame.itertuples(index=False)], index=frame.index)
    subject = frame["kind"] + ", by its " + frame["source"]
    table = pd.DataFrame({"subject": subject, "plans": 1})
    for name in (THAT, SAME_BITS, OPEN, "undecided", ANOTHER, "none", "error"):
        table[name] = (found == name).astype(int)
    table = table.groupby("subject", sort=False).sum()
    table["median seconds"] = frame.groupby(subject, sort=False)["seconds"].median()
    return table.reset_index()


def confusion_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Boundary and planted word against the word answered, over all subjects that got an answer."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for row in frame.itertuples(index=False):
        answered = json.loads(row.answered) if row.status in ("identified", "undecided") else []
        for name, word in json.loads(row.planted).items():
            words = sorted({a[name] for a in answered if name in a})
            found = " or ".join(words) if words else row.status
            cell = counts.setdefault((name, word), {})
            cell[found] = cell.get(found, 0) + 1
    table = pd.DataFrame(counts).T.fillna(0).astype(int)
    table.insert(0, "planted", [f"{name} = {word}" for name, word in table.index])
    return table.reset_index(drop=True)


def case_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a case: measured beside claimed."""

    def number(value: float) -> str:
        return "–" if pd.isna(value) else f"{value:.3g}"

    cells = zip(frame["measured"], frame["measured_low"], frame["measured_high"], frame["unit"], strict=True)
    measured = [f"{number(m)} ({number(low)} to {number(high)}) {unit}" for m, low, high, unit in cells]
    return pd.DataFrame(
        {
            "case": frame["source"],
            "boundary": frame["where"],
            "before": frame["before"],
            "after": frame["after"],
            "quantity": frame["measure"],
            "measured (range over draws)": measured,
            "claimed": frame["claimed_text"],
            "verdict": frame["verdict"],
            "share of elements that differ": frame["share_differ"],
            "why": frame["why"],
        }
    )


def case_sentence(frame: pd.DataFrame) -> str:
    phrases = {
        "fits": "fit",
        "does not fit": "do not",
        "same direction": "have the claimed direction",
        "cannot be decided here": "cannot be decided here",
    }
    counts = frame["verdict"].value_counts()
    said = ", ".join(f"{counts[verdict]} {phrase}" for verdict, phrase in phrases.items() if verdict in counts)
    return f"**Cases of the field:** of {len(frame)} claims of public threads {said} (each with its source: report)."


def study_sentences(folder: Path, run_id: str, speed: pd.DataFrame) -> list[str]:
    """A sentence of each study that the folder has. run_id, speed: of the bench that they stand beside, and its times; a
    study of another commit says of which."""
    runs = load_runs(folder)
    beside = runs[run_id]["environment"].get("commit")

    def said(table: str, write: Callable[[pd.DataFrame], str]) -> Iterator[str]:
        found = latest(folder, table)
        sentence = write(found[1]) if found is not None else ""
        if sentence:
            commit = runs[found[0]]["environment"].get("commit")
            yield sentence + (f" (Commit {commit}.)" if commit != beside else "")

    return [
        *said("implementations", implementation_sentence),
        *said("fingerprints", confusion_sentence),
        *said("budget", largest_share_sentence),
        *said("budget", rope_sentence),
        *said("cases", case_sentence),
        *said("audit", audit_sentence),
        *said("executed", executed_sentence),
        *impact_report.sentences(folder, speed),
        *gpu_findings.sentences(folder),
    ]


def implementation_sentence(frame: pd.DataFrame) -> str:
    """What the compiler changes: implementations whose answer depends on how they are run."""
    torch_rows = frame[(frame["kind"] == "rmsnorm") & frame["how"].isin(["eager", "torch.compile"])]
    plans = torch_rows.pivot(index="implementation", columns="how", values="plan").dropna()
    moved = list(plans.index[plans["eager"] != plans["torch.compile"]]) if len(plans.columns) == 2 else []
    if not moved:
        return ""
    eager, compiled = (answer_words(plans[how][moved[0]]) for how in ("eager", "torch.compile"))
    return (
        f"**torch.compile moves a boundary** in {len(moved)} of {len(plans)} implementations ({', '.join(moved)}): "
        f"eager rounds `{eager}`, compiled `{compiled}`."
    )


def confusion_sentence(frame: pd.DataFrame) -> str:
    table = confusion_summary(frame).set_index("subject").sum()
    open_, wrong = int(table[OPEN]), int(table[ANOTHER] + table["none"] + table["error"] + table["undecided"])
    return (
        f"**The fingerprint** named {int(table[THAT]):,} of {int(table['plans']):,} planted plans by the planted words alone, "
        f"{int(table[SAME_BITS])} together with other words that store the same bits; {open_} up to a step in fp32 that plans do not "
        f"fix, {wrong} not at all."
    )


# ---------------------------------------------------------------- sections of the report


def _implementations(frame: pd.DataFrame) -> str:
    return (
        "## What public implementations do\n\nBy fingerprint (`castpoint survey`), not by reading. Named are the "
        "boundaries that round to bf16; what is not mentioned is kept in fp32, eps is added in fp32, and the order is "
        f"(x·rstd)·w.\n\n{markdown(implementation_rows(frame))}"
    )


def _fingerprints(frame: pd.DataFrame) -> str:
    return (
        "## The fingerprint on plans it should know\n\nEach plan of a single norm, and chains, as a black box "
        "(`castpoint confusion`); noise moves one element in a thousand by an ulp.\n\n"
        f"{markdown(confusion_summary(frame))}\n\nPlanted word against the word answered; `a or b`: several candidates "
        f"were left.\n\n{markdown(confusion_table(frame))}"
    )


def _budget(frame: pd.DataFrame) -> str:
    said = "\n\n".join(filter(None, (largest_share_sentence(frame), rope_table(frame))))
    return f"## Error budget\n\n{said}\n\n![error budget](plots/budget.png)"


def _cases(frame: pd.DataFrame) -> str:
    return (
        "## Cases of the field\n\n`before` is what the thread holds up as right, `after` what it complains of. A claim fits "
        "if the measured range (95 % of draws) meets it and the figure is within a factor of 1.5; it does not fit if the "
        f"ranges are apart.\n\n{markdown(case_table(frame))}"
    )


def audit_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a kernel and target."""
    keywords = frame["keywords"].where(frame["keywords"] == "", " " + frame["keywords"])
    return pd.DataFrame(
        {
            "target": frame["target"],
            "kernel": frame["kernel"] + keywords,
            "plan": frame["plan"],
            "declared": frame["declared"],
            "found in machine code, elements a thread": frame["machine"],
            "fused": frame["fused"],
            "matrix instructions": frame["matrix"],
            "registers": frame["registers"],
            "spills, bytes": frame["spills"],
            "SMEM, bytes": frame["shared"],
            "status": frame["status"] + frame["reason"].where(frame["reason"] == "", ": " + frame["reason"]),
        }
    )


def audit_sentence(frame: pd.DataFrame) -> str:
    counts = frame["status"].value_counts()
    said = ", ".join(f"{count} {status}" for status, count in counts.items())
    return (
        f"**Static audit:** of {len(frame)} kernels compiled for {', '.join(frame['target'].unique())}: {said}. "
        f"Fused multiply-adds that the source does not have: {int(frame['fused'].sum())}."
    )


def _audit(frame: pd.DataFrame) -> str:
    return (
        "## Static audit\n\nEvery kernel compiled ahead of time (`castpoint audit`). `declared`: the roundings that the plan "
        "asks of this kernel. An `ok` says that each was found in TTIR where it belongs and followed into the machine code, and "
        f"that there is no other.\n\n{markdown(audit_table(frame))}"
    )


def executed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a target and plan."""
    kernels = frame["config"] + frame["rope"].astype(str) + frame["tokens"].astype(str)
    table = frame.assign(kernels=kernels, ok=frame["status"] == "ok")
    table = table.assign(exact=frame["share_equal"].where(frame["check"] == Check.EXACT))
    groups = table.groupby(["target", "plan"], sort=False)
    found = groups.agg(kernels=("kernels", "nunique"), checks=("ok", "size"), ok=("ok", "sum"), exact=("exact", "min"))
    return found.rename(columns={"exact": "least share equal to the spec, exact inputs"}).reset_index()


def executed_sentence(frame: pd.DataFrame) -> str:
    exact = frame[frame["check"] == Check.EXACT]
    drawn = frame[frame["check"] != Check.EXACT]
    return (
        f"**Compiled for {', '.join(frame['target'].unique())}, run on this CPU:** of {len(exact)} kernels "
        f"{int((exact['status'] == 'ok').sum())} equal their spec in every bit where no sum depends on order; on drawn "
        f"weights {int((drawn['status'] == 'ok').sum())} of {len(drawn)} stay inside their envelope."
    )


def _executed(frame: pd.DataFrame) -> str:
    return (
        "## Compiled kernels, run on a CPU\n\nEvery kernel as a launch compiles it, its PTX run instruction by instruction "
        "(`castpoint execute`): what Triton's compiler made of it, without ptxas and without a GPU's order of sums. "
        f"Tiles of tuning are run for a plan of each place of rstd.\n\n{markdown(executed_table(frame))}"
    )


def configs_section(frame: pd.DataFrame) -> str:
    """Of report.md: one row a binary, a column a target."""
    cells = frame["registers"].map("{:.0f}".format) + " / " + frame["spills"].map("{:.0f}".format)
    cells += " / " + (frame["shared"] / 1024).map("{:.1f}".format)
    cells = cells.where(frame["status"] == "ok", frame["status"])
    table = frame.assign(cell=cells).pivot_table(
        index=["kernel", "plan", "keywords"], columns="target", values="cell", aggfunc="first", sort=False
    )
    return (
        "## Configs\n\nEvery tile that `norm_qkv` may be launched with, and its main loop by itself (`matmul`), "
        "compiled ahead of time (`castpoint configs`): registers a thread / bytes spilled a thread / KiB of "
        "shared memory a block. Nothing is timed by this: `castpoint tune` does that on a GPU."
        f"\n\n{markdown(table.reset_index())}"
    )


SECTIONS: dict[str, Callable[[pd.DataFrame], str]] = {
    "implementations": _implementations,
    "fingerprints": _fingerprints,
    "budget": _budget,
    "cases": _cases,
    "audit": _audit,
    "executed": _executed,
    "configs": configs_section,
}


def study_sections(folder: Path) -> list[str]:
    """Sections of report.md, for the studies that the folder has."""
    found = [write(rows[1]) for table, write in SECTIONS.items() if (rows := latest(folder, table)) is not None]
    gpu = gpu_report.section(folder)
    return found + impact_report.sections(folder) + ([gpu] if gpu else [])
