"""report.md, generated from the records of one run. No number here is typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from castpoint.harness.report import checks, failures, k_norms
from castpoint.harness.report.findings import AMPLIFIED, NOISE, anchor, findings
from castpoint.harness.report.markdown import markdown, paragraphs, percent
from castpoint.harness.report.studies import study_sections
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.frames import (
    Frames,
    best_backend,
    between_machines,
    instruction_sets,
    load,
    newest_gpu_run,
    of_one_layer,
    over_layers,
)
from castpoint.harness.runs.holds import MARK
from castpoint.harness.runs.records import load_runs
from castpoint.harness.runs.words import Backend
from castpoint.variants.catalogue import PLANS

AS_DRAWN = (
    "The first layer with its K-norm weights as drawn, and with others in their place. q's and K's are drawn independently: "
    "which q weight meets the largest of K's is chance here, and need not be in a trained model. Attention is causal, "
    "without position encoding."
)


def newest_run(folder: Path) -> str:
    """The newest finished bench of a results folder; without one its GPU run, finished or not. Raises UserError if there
    is neither."""
    benches = [i for i, run in load_runs(folder).items() if "finished" in run and run.get("command") == "bench"]
    found = benches[-1] if benches else newest_gpu_run(folder)
    if not found:
        raise UserError(f"{folder} holds no finished bench and no row of a GPU: run `make bench` first")
    return found


def with_ends(errors: pd.DataFrame, reference: str, column: str, form: str, scale: float = 1) -> pd.Series:
    """Plan -> `0.00393 (0.00356 to 0.00508)`: a column of K's errors over all layers, its least and its greatest layer."""
    ends = of_one_layer(errors, reference, column) * scale
    whole = over_layers(errors, reference, column) * scale
    said = {plan: [form.format(v) for v in (whole[plan], low, high)] for plan, low, high in ends.itertuples()}
    cells = {plan: each[0] if len(set(each)) == 1 else "{} ({} to {})".format(*each) for plan, each in said.items()}
    return pd.Series(cells, dtype=object)


def plan_table(frames: Frames) -> pd.DataFrame:
    """One row a plan: where it rounds, what that costs against the truth and eager, and its time on a GPU. Times of a CPU
    rank two matmuls, so they stand with what they are worth, under Times."""
    errors, speed = frames["errors"], frames["speed"]
    columns = {
        "rounds": pd.Series({name: " ".join(named.plan.roundings()) for name, named in PLANS.items()}),
        "K error, relative rms": with_ends(errors, "truth", "rel_rms", "{:.3g}"),
        "K correctly rounded, %": with_ends(errors, "truth", "share_equal", "{:.4g}", 100),
        f"K equal to eager, % {MARK}": with_ends(errors, "eager", "share_equal", "{:.4g}", 100),
        "K bias": with_ends(errors, "truth", "signed_mean", "{:+.1e}"),
    }
    if best_backend(speed) != "inductor":
        tokens = speed["tokens"].max()
        rows = speed[(speed["tokens"] == tokens) & (speed["backend"] == best_backend(speed))].set_index("plan")
        columns |= {f"time at {tokens:.0f} tokens, µs": rows["p50_us"], "against eager": rows["speedup_vs_eager"]}
    names = [name for name in PLANS if name in set(errors["plan"])]
    return pd.DataFrame(columns, index=pd.Index(names, name="plan")).reset_index()


def noise_floor_table(eager: pd.DataFrame) -> pd.DataFrame:
    """Least and greatest share of K's elements over layers that differ from eager's, a column an instruction set."""
    rows = eager[eager["status"] == "ok"].sort_values("backend", key=lambda named: named == Backend.SPEC, kind="stable")
    against = rows["backend"].where(rows["backend"] != Backend.SPEC, rows["plan"] + "'s spec")
    table = pd.DataFrame(index=against.unique())
    for isa in instruction_sets(eager):
        here = rows[rows["isa"] == isa]
        shares = (1 - here["share_equal"]).groupby(against).agg(["min", "max"])
        cells = {name: percent(low, high) for name, low, high in shares.itertuples()}
        table[f"eager on {isa}: {here['kernel'].iloc[0]}"] = pd.Series(cells)
    return table.rename_axis("K elements that differ, over layers").reset_index()


def machine_note(eager: pd.DataFrame) -> str:
    """What a mark beside a share of eager's bits means, by how much another instruction set moves it; empty without rows."""
    moves = between_machines(eager)
    if len(instruction_sets(eager)) < 2:
        return f"{MARK} Of this machine's PyTorch." if len(moves) else ""
    return (
        f"{MARK} Of this machine's PyTorch: with the instruction sets that this CPU plays ({', '.join(instruction_sets(eager))}) a "
        f"share moves by at most {100 * moves.max():.1g} percentage points (`{moves.idxmax()}`)."
    )


def kernel_table(frames: Frames) -> pd.DataFrame:
    """Each plan's kernels against its spec, worst of q, k and v, and whether the envelope explains every element."""
    errors = frames["errors"]
    rows = errors[(errors["reference"] == "spec") | (errors["status"] == "failed")]
    worst = {"share_equal": "min", "rel_rms": "max", "status": lambda said: next((s for s in said if s != "ok"), "ok")}
    table = rows.groupby(["plan", "backend"], sort=False).agg(worst)
    names = {"share_equal": f"equal to spec {MARK}", "rel_rms": f"rel_rms {MARK}"}
    return table.rename(columns=names).reset_index()


def speed_table(frames: Frames) -> pd.DataFrame:
    names = {"tokens": "tokens", "plan": "plan", "backend": "backend", "p10_us": "p10, µs", "p50_us": "p50, µs"}
    names |= {"p90_us": "p90, µs", "roofline_share": "share of roofline", "speedup_vs_eager": "against eager"}
    names |= {"speedup_vs_compile": "against compile", "status": "status"}
    return frames["speed"][list(names)].rename(columns=names).sort_values(["tokens", "p50, µs"], kind="stable")


def tables(frames: Frames) -> dict[str, str]:
    """The bench's tables in Markdown, by name."""
    return {
        "plans": markdown(plans := plan_table(frames), right=[name for name in plans if name.startswith("K ")]),
        "noise": markdown(noise_floor_table(frames["eager"])),
        "kernels": markdown(kernel_table(frames)),
        "amplification": k_norms.explained(frames["k_norms"]),
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
    fp32 = f" and {rate / 1e12:.3g} TFLOP/s fp32" if rate else ""
    return (
        f"Measured in the same run: {ceilings['bytes_per_s'] / 1e9:.1f} GB/s copy, {ceilings['bf16_flops_per_s'] / 1e12:.3g} "
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
        said, sections, checked = f"Run {run_id} of `castpoint gpu`, without a bench.", [failed], ""
    else:
        said = conditions(run_id, run)
        found = "\n".join(finding.line() for finding in findings(folder, frames))
        sections = [f"## Findings\n\n{found}" if found else "", failed, *bench_sections(run, frames)]
        checked = checks.section(folder)
    sections += [*study_sections(folder, run["environment"].get("commit", "")), checked]
    sections = list(filter(None, sections))
    headings = [section.splitlines()[0].removeprefix("## ") for section in sections]
    contents = "\n".join(f"- [{heading}](#{anchor(heading)})" for heading in headings)
    path = folder / "report.md"
    path.write_text(paragraphs(f"# Results\n\n{said}", contents, *map(str.rstrip, sections)) + "\n")
    return path


def _not_played(eager: pd.DataFrame) -> str:
    """A sentence an instruction set that was not played; empty without one."""
    rows = eager[eager["status"] != "ok"]
    return "".join(f"\n\nWithout {row.isa}: {row.reason}." for row in rows.itertuples())


def bench_sections(run: dict[str, Any], frames: Frames) -> list[str]:
    """A bench's tables, each with its plots."""
    t, speed, eager = tables(frames), frames["speed"], frames["eager"]
    cpu = (
        "These are CPU times through Inductor. PyTorch's bf16 matmul returns bf16 on a CPU, so only plans that round proj to "
        "nearest can use it; all others run an fp32 matmul over widened operands. They rank these two matmuls on this machine, "
        "not cast plans on a GPU. "
    )
    cpu = cpu if len(speed) and best_backend(speed) == "inductor" else ""
    return [
        "## Plans\n\nErrors are those of the plan's spec, the cost of its boundaries alone: over layers the rms of an rms, the mean "
        "of all else, and in brackets the least and the greatest layer. Relative "
        "errors are relative to the head's rms. Bias is the mean error along the value's sign: below 0, values shrink. "
        f"Eager is Hugging Face's Qwen3 code, for the two gemma plans its Gemma 3 code.\n\n{t['plans']}\n\n"
        f"{machine_note(eager)}\n\n![error of each plan](plots/plans.png)\n\n![histogram in ulps](plots/ulps.png)",
        paragraphs(
            f"## {AMPLIFIED}",
            t["amplification"] and AS_DRAWN,
            t["amplification"],
            "![error per layer](plots/layers.png)\n\n![gain per channel](plots/gain.png)",
        ),
        f"## {NOISE}\n\nEager's K against eager in another batch, on other threads or on another instruction set, and against the "
        f"spec of every plan: least to greatest share of elements that differ, over layers. One CPU plays the instruction sets "
        "(`ONEDNN_MAX_CPU_ISA`); behind each stands what oneDNN multiplies by. Another make of CPU may add otherwise with the same."
        f"\n\n{t['noise']}{_not_played(eager)}",
        "## Kernels against their specs\n\nFirst layer; the worst of q, k and v. `ok`: every element lies in the plan's "
        "envelope, and on inputs whose sums are exact Triton equals the spec bit for bit. "
        f"On a CPU Triton runs interpreted. {MARK} Of this machine: its BLAS decides the order of sums.\n\n{t['kernels']}",
        f"## Times\n\nAll of this machine. {cpu}{limits(run, speed)}\n\n{t['speed']}\n\n![time against tokens](plots/time.png)",
    ]
