"""report.md, generated from the records of one run. No number here is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.report import failures
from castpoint.harness.report.findings import AMPLIFIED, NOISE, anchor, draw_table, findings
from castpoint.harness.report.markdown import markdown, paragraphs, under
from castpoint.harness.report.studies import study_sections
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.frames import (
    Frames,
    best_backend,
    first_layer,
    load,
    newest_gpu_run,
    of_one_layer,
    over_layers,
    own,
)
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.schema import Backend
from castpoint.variants.catalogue import PLANS


def newest_run(folder: Path) -> str:
    """The newest finished bench of a results folder; without one its GPU run, finished or not. Raises UserError if there
    is neither."""
    benches = [i for i, run in load_runs(folder).items() if "finished" in run and run.get("command") == "bench"]
    found = benches[-1] if benches else newest_gpu_run(folder)
    if not found:
        raise UserError(f"{folder} holds no finished bench and no row of a GPU: run `make bench` first")
    return found


def plan_table(frames: Frames) -> pd.DataFrame:
    """One row a plan: where it rounds, what that costs against the truth and eager, and its time on a GPU. Times of a CPU
    rank two matmuls, so they stand with what they are worth, under Times."""
    errors, speed = frames["errors"], frames["speed"]
    ends = of_one_layer(errors, "truth", "rel_rms").itertuples()
    said = {plan: f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}" for plan, low, high in ends}
    columns = {
        "rounds": pd.Series({name: " ".join(named.plan.roundings()) for name, named in PLANS.items()}),
        "K error, relative rms": over_layers(errors, "truth", "rel_rms"),
        "of one layer": pd.Series(said, dtype=object),
        "K correctly rounded": over_layers(errors, "truth", "share_equal"),
        "K equal to eager": over_layers(errors, "eager", "share_equal"),
        "K bias": over_layers(errors, "truth", "signed_mean"),
    }
    if best_backend(speed) != "inductor":
        tokens = speed["tokens"].max()
        rows = speed[(speed["tokens"] == tokens) & (speed["backend"] == best_backend(speed))].set_index("plan")
        columns |= {f"time at {tokens:.0f} tokens, µs": rows["p50_us"], "against eager": rows["speedup_vs_eager"]}
    names = [name for name in PLANS if name in set(errors["plan"])]
    return pd.DataFrame(columns, index=pd.Index(names, name="plan")).reset_index()


def noise_floor_table(frames: Frames) -> pd.DataFrame:
    """Eager against itself."""
    errors = own(frames["errors"])
    itself = errors["backend"].isin([Backend.EAGER_BATCH_OF_1, Backend.EAGER_ONE_THREAD])
    names = {"share_equal": "equal to eager", "max_ulp": "max ulp", "max_abs": "max abs", "rel_rms": "rel_rms"}
    return errors[(errors["reference"] == "eager") & itself][["plan", "backend", "output", *names]].rename(
        columns=names
    )


def kernel_table(frames: Frames) -> pd.DataFrame:
    """Each plan's kernels against its spec, worst of q, k and v, and whether the envelope explains every element."""
    errors = own(frames["errors"])
    rows = errors[(errors["reference"] == "spec") | (errors["status"] == "failed")]
    worst = {"share_equal": "min", "rel_rms": "max", "status": lambda said: next((s for s in said if s != "ok"), "ok")}
    table = rows.groupby(["plan", "backend"], sort=False).agg(worst)
    return table.rename(columns={"share_equal": "equal to spec"}).reset_index()


def amplification_table(frames: Frames) -> pd.DataFrame:
    """What grows with the K-norm weights and what does not: plan hf, first layer, own weights and controls."""
    amplified, errors = frames["amplification"], frames["errors"]
    rows = first_layer(amplified).query("plan == 'hf'")
    same = errors[errors["layer"].isin(rows["layer"])].query(
        "plan == 'hf' and reference == 'truth' and backend == 'spec'"
    )
    before, after = (same[same["output"] == output].set_index("weights") for output in ("k_proj", "k"))
    measures = {
        "largest K-norm weight": rows["k_norm_max"],
        "gain of a channel, largest (measured)": rows["gain_measured_max"],
        "K max abs error, before the norm": rows["k_max_abs_before"],
        "K max abs error, after": rows["k_max_abs_after"],
        "logit rms error": rows["logit_rms_error"],
        "logit max error": rows["logit_max_error"],
        "softmax total variation, mean": rows["softmax_tv_mean"],
        "most attended key flips": rows["top_key_flips"],
        "K relative rms error, before": rows["k_rel_rms_before"],
        "K relative rms error, after": rows["k_rel_rms_after"],
        "K p99 error in ulps, before": rows["weights"].map(before["p99_ulp"]),
        "K p99 error in ulps, after": rows["weights"].map(after["p99_ulp"]),
        "K correctly rounded, before": rows["weights"].map(before["share_equal"]),
        "K correctly rounded, after": rows["weights"].map(after["share_equal"]),
    }
    shares = [name for name in measures if "flips" in name or "rounded" in name]  # of rows: markdown knows columns
    cells = {name: values.map("{:.4g}".format) for name, values in measures.items()}
    cells |= {name: (100 * measures[name]).map("{:.3g} %".format) for name in shares}
    table = pd.DataFrame(cells).T.set_axis(list(rows["weights"]), axis=1)
    return table.reset_index(names="measure, plan hf")


def speed_table(frames: Frames) -> pd.DataFrame:
    names = {"tokens": "tokens", "plan": "plan", "backend": "backend", "p10_us": "p10, µs", "p50_us": "p50, µs"}
    names |= {"p90_us": "p90, µs", "roofline_share": "share of roofline", "speedup_vs_eager": "against eager"}
    names |= {"speedup_vs_compile": "against compile", "status": "status"}
    return frames["speed"][list(names)].rename(columns=names).sort_values(["tokens", "p50, µs"], kind="stable")


def tables(frames: Frames) -> dict[str, str]:
    """The bench's tables in Markdown, by name."""
    amplified = amplification_table(frames)
    return {
        "plans": markdown(plan_table(frames), right=["of one layer"]),
        "noise": markdown(noise_floor_table(frames)),
        "kernels": markdown(kernel_table(frames)),
        "amplification": markdown(amplified, right=amplified.columns[1:]),
        "speed": markdown(speed_table(frames)),
    }


def conditions(run_id: str, run: dict[str, Any]) -> str:
    """One sentence on what was measured, where, and by which versions."""
    s, e = run["settings"], run["environment"]
    weights = f"real weights ({s['checkpoint']})" if s["checkpoint"] else "drawn weights"
    if not s["checkpoint"] and s["model"] == "qwen3-0.6b":
        weights += (
            " calibrated to published statistics, **not the checkpoint** (K-norm maxima are Qwen3-0.6B's own in layers 0, 1, 2, 4 "
            "and 5, inferred elsewhere)"
        )
    native = "" if e.get("native_bf16") else ", which has no bf16 instructions"
    machine = e["gpu"]["name"] if "gpu" in e else f"CPU: {e['processor']}, {e['threads']} threads{native}"
    return (
        f"{s['model']}, {len(s['layers'])} layers, {s['tokens']} tokens, {weights}. {machine}; torch {e['versions']['torch']}, "
        f"Triton {e['versions']['triton']}, commit {e['commit']}, run {run_id}."
    )


def limits(run: dict[str, Any], speed: pd.DataFrame) -> str:
    """What the times were measured beside; empty where there are none."""
    ceilings = run.get("ceilings")
    if not ceilings or not len(speed):
        return ""
    regimes = speed["regime"].iloc[0]
    if speed["regime"].nunique() > 1:  # a GPU rotates fewer weights where outputs fill its memory
        at = {regime: rows["tokens"].unique() for regime, rows in speed.groupby("regime", sort=False)}
        regimes = "; ".join(
            f"{regime} at {', '.join(f'{t:.0f}' for t in tokens)} tokens" for regime, tokens in at.items()
        )
    rate = ceilings.get("fp32_flops_per_s")
    fp32 = f" and {rate / 1e12:.2f} TFLOP/s fp32" if rate else ""
    return (
        f"Measured in the same run: {ceilings['bytes_per_s'] / 1e9:.1f} GB/s copy, {ceilings['bf16_flops_per_s'] / 1e12:.2f} "
        f"TFLOP/s bf16{fp32} matmul; the roofline takes the faster. {regimes}. "
        f"Load average over the minute before, this run's own sweeps included: {run['load_average']:.1f} on "
        f"{run['environment']['threads']} threads; a second busy process multiplies CPU times."
    )


def write_report(folder: Path, run_id: str) -> Path:
    """Writes report.md into the results folder and returns its path. Of a run that is no bench it has what failed and
    the sections on GPU and studies alone."""
    frames, run = load(folder, run_id), load_runs(folder)[run_id]
    failed = failures.section(failures.failures(folder, run_id))
    if run_id == newest_gpu_run(folder):
        said, sections = f"Run {run_id} of `castpoint gpu`, without a bench.", [failed]
    else:
        said = conditions(run_id, run)
        found = "\n".join(finding.line() for finding in findings(folder, frames))
        sections = [f"## Findings\n\n{found}" if found else "", failed, *bench_sections(run, frames)]
    sections = [*filter(None, sections), *study_sections(folder, run["environment"].get("commit", ""))]
    headings = [section.splitlines()[0].removeprefix("## ") for section in sections]
    contents = "\n".join(f"- [{heading}](#{anchor(heading)})" for heading in headings)
    path = folder / "report.md"
    path.write_text(paragraphs(f"# Results\n\n{said}", contents, *map(str.rstrip, sections)) + "\n")
    return path


def bench_sections(run: dict[str, Any], frames: Frames) -> list[str]:
    """A bench's tables, each with its plots."""
    t, speed, draws = tables(frames), frames["speed"], frames["draws"]
    over = f"Over {draws['seed'].nunique()} draws, against weights of 1: median (least to greatest)."
    cpu = (
        "These are CPU times through Inductor. PyTorch's bf16 matmul returns bf16 on a CPU, so only plans that round proj to "
        "nearest can use it; all others run an fp32 matmul over widened operands. They rank these two matmuls on this machine, "
        "not cast plans on a GPU. "
    )
    cpu = cpu if len(speed) and best_backend(speed) == "inductor" else ""
    return [
        "## Plans\n\nErrors are those of the plan's spec, rms over layers: the cost of its boundaries alone; of one layer: the "
        "least and the greatest. Relative "
        "errors are relative to the head's rms. Bias is the mean error along the value's sign: below 0, values shrink. "
        f"Eager is Hugging Face's Qwen3 code, for the two gemma plans its Gemma 3 code.\n\n{t['plans']}\n\n"
        "![error of each plan](plots/plans.png)\n\n![histogram in ulps](plots/ulps.png)",
        paragraphs(
            f"## {AMPLIFIED}\n\nFirst layer, and the same layer with every K-norm weight set to one "
            f"number. Attention is causal, without position encoding.\n\n{t['amplification']}",
            under(over, draw_table(draws)),
            "![error per layer](plots/layers.png)\n\n![gain per channel](plots/gain.png)",
        ),
        f"## {NOISE}\n\nEager against itself, first layer.\n\n{t['noise']}",
        "## Kernels against their specs\n\nFirst layer; the worst of q, k and v. `ok`: every element lies in the plan's "
        "envelope, and on inputs whose sums are exact Triton equals the spec bit for bit. "
        f"On a CPU Triton runs interpreted.\n\n{t['kernels']}",
        f"## Times\n\n{cpu}{limits(run, speed)}\n\n{t['speed']}\n\n![time against tokens](plots/time.png)",
    ]
