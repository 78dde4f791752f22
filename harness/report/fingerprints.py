"""Fingerprints as tables: what public implementations were found to be, and what was answered to known plans."""

from __future__ import annotations

import json

import pandas as pd

from castpoint.harness.report.markdown import markdown

# Words of a fingerprint that need no mention.
USUAL = {"weight_offset": "none", "eps": "float32", "root": "rsqrt", "order": "(x*rstd)*w", "scale": "prologue"}


def answer_words(plan: str) -> str:
    """A fingerprint's candidates in words: what is rounded, what is unusual, and what was left open."""
    candidates = json.loads(plan) if plan else []
    if not candidates:
        return ""
    common = {name: word for name, word in candidates[0].items() if all(c[name] == word for c in candidates)}
    places = [name for name in common if name not in (*USUAL, "matmul", "bias") and common[name] != "fp32"]
    cut = {"bf16-rne": "", "bf16-rtz": " (truncated)"}
    rounded = [name + cut.get(common[name], f" ({common[name]})") for name in places]
    other = [f"{name} {common[name]}" for name in USUAL if name in common and common[name] != USUAL[name]]
    offsets = {"weight_offset fp32": "1 + w in fp32", "weight_offset bf16-rne": "1 + w in bf16"}
    other = [offsets.get(word, word) for word in other]
    left = [name for name in candidates[0] if name not in common]
    other += [f"{name} {' **or** '.join(dict.fromkeys(c[name] for c in candidates))}" for name in left]
    return "; ".join([", ".join(rounded) or "nothing", *other])


def implementation_rows(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an implementation, the wrong ones first."""
    words = frame["plan"].map(answer_words)
    names = {"implementation": "implementation", "kind": "kind", "how": "how", "expected": "expected"}
    names |= {"status": "answer", "verdict": "verdict", "plan": "rounds to bf16", "share_equal": "share explained"}
    names |= {"runner_up_share_equal": "best rejected plan's share", "source": "expected by", "versions": "versions"}
    rows = frame.assign(plan=words.where(frame["status"] != "none", "nearest: " + words))
    rows = rows.sort_values("verdict", key=lambda verdict: verdict != "wrong", kind="stable")
    return rows[list(names)].rename(columns=names)


def verdicts_summary(frame: pd.DataFrame) -> str:
    """How many answers are those written down beforehand; empty for records in which none was."""
    asked = frame[frame["verdict"] != ""]
    if asked.empty:
        return ""
    counts = asked["verdict"].value_counts()
    right, open_, wrong = (counts.get(word, 0) for word in ("right", "left open", "wrong"))
    functions = asked[["implementation", "kind"]].drop_duplicates()
    installed = f"; {len(frame) - len(asked)} more were not asked" if len(frame) > len(asked) else ""
    return (
        f"{len(functions)} callables in {len(asked)} ways to run them, each held to a right answer that is "
        f"read from its source or what else `expected by` names: {right} answered right, {open_} right with fp32 steps "
        f"left open, {wrong} wrong"
        f"{installed}."
    )


def implementation_groups(frame: pd.DataFrame) -> pd.DataFrame:
    """One row an answer: which public implementations gave it."""
    frame = frame[frame["package"] != "castpoint"]
    ways = {"torch.compile, emulate_precision_casts": "compiled, casts emulated", "torch.compile": "compiled"}
    rows = implementation_rows(frame).sort_index().replace({"rounds to bf16": {"": "–"}, "how": ways})
    rows["implementation"] += rows["kind"].map({"head_norm": " (head norm)"}).fillna("")
    answer = ["rounds to bf16", "answer"]
    hows = rows.groupby([*answer, "implementation"], sort=False)["how"].agg("; ".join).reset_index()
    names = hows.groupby([*answer, "how"], sort=False)["implementation"].agg(", ".join).reset_index()
    names["implementations"] = names["implementation"] + " (" + names["how"] + ")"
    return names.groupby(answer, sort=False)["implementations"].agg(" · ".join).reset_index()


THAT, SAME_BITS, OPEN, ANOTHER = "that plan", "with one of the same bits", "that plan, fp32 steps open", "another plan"


def outcome(row: tuple) -> str:
    """What a row of fingerprints.csv answered to the planted plan. `with one of the same bits`: it is named together
    with words that store the same on every row searched. `fp32 steps open`: every candidate is that plan, and they
    differ in eps, root or order, which no plan fixes."""
    planted, answered = json.loads(row.planted), json.loads(row.answered)
    if row.status in ("none", "error"):
        return row.status
    if all(planted.items() <= words.items() for words in answered):
        return THAT if row.status == "identified" else OPEN
    if not any(all(word in words[name].split(" or ") for name, word in planted.items()) for words in answered):
        return ANOTHER
    return SAME_BITS if row.status == "identified" else "undecided"


def confusion_summary(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a kind of subject: how many were answered with the planted plan, left open, or answered with another."""
    found = pd.Series([outcome(row) for row in frame.itertuples(index=False)], index=frame.index)
    subject = (frame["kind"] + ", by its " + frame["source"]).rename("subject")
    outcomes = [THAT, SAME_BITS, OPEN, "undecided", ANOTHER, "none", "error"]
    table = pd.crosstab(subject, found).reindex(index=subject.unique(), columns=outcomes, fill_value=0)
    table.insert(0, "plans", table.sum(axis=1))
    table["median seconds"] = frame.groupby(subject)["seconds"].median()
    return table.reset_index()


def confusion_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Boundary and planted word against the word answered, over all subjects that got an answer."""
    pairs = []
    for row in frame.itertuples(index=False):
        answered = json.loads(row.answered) if row.status in ("identified", "undecided") else []
        for name, word in json.loads(row.planted).items():
            words = sorted({a[name] for a in answered if name in a})
            pairs.append((f"{name} = {word}", " or ".join(words) or row.status))
    order = list(dict.fromkeys(planted for planted, _ in pairs))
    pairs.sort(key=lambda pair: order.index(pair[0]))
    planted, found = (pd.Series(words) for words in zip(*pairs, strict=True))
    table = pd.crosstab(planted, found).loc[order, found.unique()]
    return table.rename_axis(index="planted", columns=None).reset_index()


def implementations_section(frame: pd.DataFrame) -> str:
    """Of report.md, from the rows of implementations.csv."""
    said = (
        "Named are the boundaries that round to bf16; what is not mentioned is kept in fp32, eps is added in fp32, and "
        "the order is (x·rstd)·w."
    )
    summary = f"{verdicts_summary(frame)} ".lstrip()
    return (
        f"## What public implementations do\n\nBy fingerprint (`castpoint study survey`). {summary}"
        f"{said}\n\n{markdown(implementation_groups(frame))}\n\nOne row a callable and a way to run it, those written "
        f"here from reports at the end:\n\n{markdown(implementation_rows(frame))}"
    )


def confusion_section(frame: pd.DataFrame) -> str:
    """Of report.md, from the rows of fingerprints.csv."""
    errors = frame.loc[frame["status"] == "error", "reason"].value_counts()
    said = "".join(f" Error, {count} times: {reason}." for reason, count in errors.items())
    return (
        "## The fingerprint on plans it should know\n\nEach plan of a single norm, and chains, as a black box "
        "(`castpoint study confusion`); noise moves one element in a thousand by an ulp. Seconds count what Triton "
        f"compiles, all of it where its cache is empty.{said}\n\n"
        f"{markdown(confusion_summary(frame))}\n\nPlanted word against the word answered; `a or b`: several candidates "
        f"were left.\n\n{markdown(confusion_table(frame))}"
    )


def captures_section(frame: pd.DataFrame) -> str:
    """Of report.md, from the rows of captures.csv."""
    names = {"kind": "kind", "tokens": "tokens", "plans": "plans planted", "told_apart": "told apart", "lost": "lost"}
    return (
        "## How much a capture tells\n\nPlans planted in one recorded call (`castpoint study confusion`): a chain of "
        "256 channels and 2 + 1 + 1 heads of 128, cut out of the calibrated layer, or its input norm. Told apart: "
        "the answer is that plan alone, or with plans that no such inputs tell from it. Lost: the answer leaves it out."
        f"\n\n{markdown(frame[list(names)].rename(columns=names))}"
    )
