"""The engine's page: where each plan's text parts from PyTorch's own, how fast, and whether large K norms spoil it."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes

from castpoint.harness.report.markdown import markdown, paragraphs
from castpoint.harness.report.style import GREY, colour, panels, save
from castpoint.harness.runs.frames import latest, load_table
from castpoint.harness.runs.words import How, KScale
from castpoint.variants.catalogue import PLANS

HEADING = "An engine with any plan inside"
EAGER, SHUFFLED = "eager", "shuffled"
FUSED = ("gemma", "hf", "cast-after-matmul", "fp32")  # beside eager in the picture: its own plan, and what fuses
LETTERS = 90  # of a text that are shown


def page(folder: Path) -> str:
    """In Markdown; its picture into plots/engine.png. Empty where no engine ran, or nothing beside eager yet."""
    if not (found := latest(folder, "engine_runs")):
        return ""
    runs, texts = found[1], load_table(folder, found[0], "engine")
    if texts["plan"].isin([EAGER, SHUFFLED]).all():
        return ""
    picture = folder / "plots" / "engine.png"
    picture.parent.mkdir(exist_ok=True)
    model = runs["model"].iloc[0]
    plot(texts[texts["model"] == model], model, picture)
    parts = [f"# {HEADING}", ABOUT, f"![Where texts part, and how probable they are](../plots/{picture.name})"]
    for name, of_model in texts.groupby("model", sort=False):
        parts += sections(of_model, runs[runs["model"] == name])
    return paragraphs(*parts)


ABOUT = (
    "An engine in the manner of nano-vLLM: sequences join and leave a batch, keys and values lie in pages of 16 "
    "tokens, a common prefix is computed once, a sequence that finds no page is sent back and computed again. The "
    "chain RMSNorm → QKV → head norm of every layer is that of a plan (Inductor at full size, PyTorch code at "
    "`--short`); `eager` is the same engine with what PyTorch's modules compute; all else is eager in every arm. "
    "Greedy text. "
    "*Margin*: where a text parts from its reference, by how much the reference's logits put its own token before the "
    "one written here; 0 is a tie. Tokens/s: sequences of a batch over the median step of one token each, on this CPU, "
    "without compilation and prompts; eager is not compiled, and no rank among GPU kernels follows from it. "
    "*Nats*: mean of − log p of the new tokens under the unchanged model in fp32 (its exponential is the perplexity)."
)


def sections(texts: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Of one model."""
    first = runs.iloc[0]
    head = (
        f"## {first['model']}\n\nWeights: {first['weights']}. {first['sequences']:.0f} prompts, "
        f"{first['prompt_tokens']:.0f} tokens together; {first['new_tokens'] / first['sequences']:.0f} new tokens "
        f"each; threads: {runs['threads'].max():.0f}."
    )
    own = texts[texts["k_scale"] == KScale.OWN]
    batch = own[(own["how"] == How.BATCH) & (own["plan"] != SHUFFLED)]
    speed = runs[(runs["k_scale"] == KScale.OWN) & (runs["how"] == How.BATCH)]
    speed = speed.set_index(["plan", "backend"])["tokens_per_s"]
    plans = parting(batch, ["plan", "backend"])
    plans.insert(2, "tokens/s here", [speed.get(arm) for arm in zip(plans["plan"], plans["backend"], strict=True)])
    ways = own[(own["how"] != How.BATCH) & (own["plan"] != SHUFFLED)]
    return [
        head,
        "Every plan, all prompts in one batch, beside `eager` in the same batch:\n\n" + markdown(plans),
        "What a batch and pages change by themselves, with no other plan (alone: one after the other):\n\n"
        + markdown(parting(ways, ["plan", "how", "beside"])),
        k_norms(texts),
        written(batch),
    ]


def parting(texts: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """A row an arm: how many texts part, where, at what margin."""
    rows = []
    for key, part in texts.groupby(by, sort=False):
        parted = part[part["equal"] < part["tokens"]]
        margins = parted["margin"]
        rows.append(
            dict(zip(by, key, strict=True))
            | {
                "texts that part": f"{len(parted)} of {len(part)}",
                "first token that parts (median)": parted["equal"].median() + 1,
                "margin there": spread(margins),
                "reference's own margin (median)": part["margin_median"].median(),
                "nats": part["nats"].mean(),
            }
        )
    return pd.DataFrame(rows)


def spread(values: pd.Series) -> str:
    """`0.12 (0 to 0.5)`: median, least and greatest."""
    if not len(values):
        return "–"
    low, middle, high = (f"{value:.2g}" for value in values.quantile([0, 0.5, 1]))
    return middle if low == high else f"{middle} ({low} to {high})"


def k_norms(texts: pd.DataFrame) -> str:
    """Whether a plan's text is still text; empty where K norms were left as they are."""
    batch = once(texts)
    changed = batch[batch["k_scale"] != KScale.OWN]
    if changed.empty:
        return ""
    fused = changed["plan"].unique()
    rows = []
    for (change, plan), part in batch[batch["plan"].isin(fused)].groupby(["k_scale", "plan"], sort=False):
        row = {"K-norm weights": change, "plan": plan, "texts that part": "–", "nats": part["nats"].mean()}
        if plan not in (EAGER, SHUFFLED):
            more, error, way = beside_eager(batch[batch["k_scale"] == change], plan)
            row["more than eager"] = f"{more:+.2f} ± {error:.2f}"
            row["part of the way to shuffled"] = f"{100 * way:+.0f} %"
            row["texts that part"] = f"{(part['equal'] < part['tokens']).sum()} of {len(part)}"
        rows.append(row)
    return (
        "### Do K-norm weights of 96.5 make gibberish?\n\nEvery layer's K-norm weights, as they are applied, are "
        "multiplied until the largest is 96.5; once with the scale of q·k divided by as much, so that the function "
        "stays up to the rounding of the new weights, once without, so that attention is sharper than the model was "
        "trained with and eager itself writes worse. Each plan beside eager **under the same weights**. Eager's own "
        "tokens in a drawn order (`shuffled`) say what gibberish of the same words scores: a plan spoils a text as far "
        "as it takes it from eager's nats to those. More than eager: mean over prompts ± its standard error, over "
        f"{batch['prompt'].nunique()} prompts.\n\n{markdown(pd.DataFrame(rows))}"
    )


def once(texts: pd.DataFrame) -> pd.DataFrame:
    """Those of a batch; of a plan that ran compiled and not, the compiled ones alone."""
    batch = texts[texts["how"] == How.BATCH]
    compiled = set(batch[batch["backend"] != EAGER]["plan"])
    return batch[~(batch["plan"].isin(compiled) & (batch["backend"] == EAGER))]


def beside_eager(batch: pd.DataFrame, plan: str) -> tuple[float, float, float]:
    """Nats a token that the plan's texts have more than eager's of the same prompts, mean and standard error; and the
    mean as a part of what shuffled has more."""
    nats = batch.pivot_table(index="prompt", columns="plan", values="nats")
    more = nats[plan] - nats[EAGER]
    return more.mean(), more.sem(), more.mean() / (nats[SHUFFLED] - nats[EAGER]).mean()


def written(batch: pd.DataFrame) -> str:
    """All texts behind the prompt whose text most plans change, and who wrote them."""
    parted = (batch["equal"] < batch["tokens"]).groupby(batch["prompt"]).sum()
    shown = batch[batch["prompt"] == parted.idxmax()]
    rows = [
        {"written by": ", ".join(dict.fromkeys(part["plan"])), "text": f"`{text[:LETTERS].replace('`', ' ')}`"}
        for text, part in shown.groupby("text", sort=False)
    ]
    return f"What they write behind prompt {parted.idxmax() + 1}:\n\n{markdown(pd.DataFrame(rows))}"


def headline(folder: Path) -> str:
    """In a sentence."""
    found = latest(folder, "engine_runs")
    if not found:
        return ""
    texts = load_table(folder, found[0], "engine")
    texts = texts[texts["model"] == texts["model"].iloc[0]]
    same = texts[texts["plan"] == "transformers"]
    parted = (texts["equal"] < texts["tokens"]).where(texts["plan"] != SHUFFLED, False)
    own = texts[texts["k_scale"] == KScale.OWN]
    alone = parted[own[(own["plan"] == EAGER) & (own["how"] == How.ALONE)].index].sum()
    run = once(own)
    plans = parted[run[run["plan"].isin(PLANS)].index].groupby(run["plan"]).sum()
    said = (
        f"{(same['equal'] == same['tokens']).sum()} of {len(same)} texts are `transformers.generate`'s token for "
        f"token; eager alone parts from eager in a batch in {alone}, a plan in {plans.min()} to {plans.max()}"
    )
    large = once(texts[texts["k_scale"] == KScale.BALANCED])
    plans = [plan for plan in large["plan"].unique() if plan in PLANS and PLANS[plan].plan.matmul != "bf16"]
    if not plans:
        return f"{said}."
    fused = parted[large[large["plan"].isin(plans)].index]
    more = max(abs(beside_eager(large, plan)[0]) for plan in plans)
    gibberish = large[large["plan"] == SHUFFLED]["nats"].mean() - large[large["plan"] == EAGER]["nats"].mean()
    return (
        f"{said}; with K-norm weights of 96.5 in every layer {fused.sum()} of {len(fused)} "
        f"texts of `{'` and `'.join(plans)}` part from eager's, and in the mean are within {more:.2f} "
        f"nats a token of its own (the same words shuffled: {gibberish:+.2f})."
    )


# ---------------------------------------------------------------- the picture


def plot(texts: pd.DataFrame, model: str, path: Path) -> None:
    """Left: a row an arm, a dot a text, where it parts. Right: nats of texts by K-norm weights, plans beside eager."""
    own = texts[(texts["k_scale"] == KScale.OWN) & (texts["plan"] != SHUFFLED)]
    compiled = own["backend"] != EAGER
    arms = []
    for (plan, backend, how), part in own.groupby(["plan", "backend", "how"], sort=False):
        name = f"{plan}, {how}" if how != How.BATCH else plan
        if (plan, how) != (EAGER, How.BATCH):
            arms.append(
                (f"{name}, not compiled" if compiled.any() and name == plan and backend == EAGER else name, part)
            )
    size = (12.5, max(4.4, 0.27 * len(arms) + 1.9))
    title = f"{model}: where greedy text parts from eager's in a batch; is it text with K-norm weights of 96.5?"
    figure, (left, right) = panels((1, 2), size, (0.19, 0.99, 0.8, 0.75), title, wspace=0.32, width_ratios=[1, 1])
    _parting(left, arms)
    _nats(right, once(texts))
    right.set_visible(bool(texts["nats"].notna().any()))
    save(figure, path, f"{model}, {texts['weights'].iloc[0]}; {texts['prompt'].nunique()} prompts; this CPU")


def _parting(axes: Axes, arms: list[tuple[str, pd.DataFrame]]) -> None:
    longest = max(part["tokens"].max() for _, part in arms)
    axes.axvline(longest, color=GREY, linewidth=0.6, linestyle=":")
    for place, (_, part) in enumerate(reversed(arms)):
        plan = part["plan"].iloc[0]
        shade = colour(plan) if plan in PLANS else GREY
        parted = part["equal"] < part["tokens"]
        offsets = pd.Series([0.3 * (2 * i / max(1, len(part) - 1) - 1) for i in range(len(part))], index=part.index)
        axes.scatter(part["equal"][parted], place + offsets[parted], color=shade, s=20)
        axes.scatter(part["equal"][~parted], place + offsets[~parted], facecolors="none", edgecolors=shade, s=20)
        said = f"{parted.sum()} of {len(part)} part"
        axes.text(1.01, place, said, transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=shade)
    names = [name for name, _ in reversed(arms)]
    axes.set(yticks=range(len(arms)), yticklabels=names, ylim=(-0.6, len(arms) - 0.4), xlim=(-0.5, longest + 0.7))
    axes.set_xlabel("tokens before the first that differs (hollow: none does)")


def _nats(axes: Axes, texts: pd.DataFrame) -> None:
    changes = [change for change in KScale if change in set(texts["k_scale"])]
    drawn = [plan for plan in (EAGER, *FUSED, SHUFFLED) if plan in set(texts["plan"])]
    if "gemma" in drawn and "hf" in drawn:
        drawn.remove("hf")
    for group, change in enumerate(changes):
        for at, plan in enumerate(drawn):
            part = texts[(texts["k_scale"] == change) & (texts["plan"] == plan)]["nats"].dropna()
            if not len(part):
                continue
            x = group + 0.16 * (at - (len(drawn) - 1) / 2)
            shade = colour(plan) if plan in PLANS else "black" if plan == EAGER else GREY
            axes.scatter([x] * len(part), part, color=shade, s=14, alpha=0.55, label="" if group else plan)
            axes.plot([x - 0.06, x + 0.06], [part.mean()] * 2, color=shade, linewidth=2.5)
    labels = [change.replace(", ", ",\n") for change in changes]
    axes.set(xticks=range(len(changes)), xticklabels=labels, ylim=(0, None), xlim=(-0.5, len(changes) - 0.5))
    axes.set_ylabel("nats a token under the\nunchanged model (line: mean)")
    axes.legend(fontsize=8, ncols=len(drawn), loc="lower center", bbox_to_anchor=(0.5, 1.0), columnspacing=0.8,
                handletextpad=0.1, frameon=False)  # fmt: skip
