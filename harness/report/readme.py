"""The README's generated block: eight plans, six findings, and what was measured where. No number here is typed."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd

from castpoint.harness.report import gpu
from castpoint.harness.report.findings import anchor, findings
from castpoint.harness.report.gpu_runs import newest
from castpoint.harness.report.markdown import markdown
from castpoint.harness.report.page import newest_run, with_ends
from castpoint.harness.report.style import ROUNDING
from castpoint.harness.runs.frames import Frames, load
from castpoint.harness.runs.holds import MARK
from castpoint.harness.runs.records import load_runs
from castpoint.variants.catalogue import PLANS

BEGIN = "<!-- generated from {folder}, run {run_id}: begin -->"
END = "<!-- generated: end -->"
BLOCK = re.compile(r"<!-- generated from (\S+), run (\S+): begin -->\n.*?<!-- generated: end -->", re.DOTALL)
SHOWN = tuple(  # from Hugging Face's order to the fewest roundings, then what engines removed
    "hf one-rounding bf16-operand deferred cast-after-matmul fp32 bf16-statistics truncating".split()
)


def headline(frames: Frames) -> str:
    """The table of plans: who rounds where, K's error in units of one rounding, its bits equal to PyTorch's."""
    errors = frames["errors"]
    error = with_ends(errors, "truth", "rel_rms", "{:.2f}", 1 / ROUNDING)
    equal = with_ends(errors, "eager", "share_equal", "{:.4g}", 100)
    plans = {name: PLANS[name] for name in SHOWN if name in error}
    columns = {
        "rounds to bf16 at": [" ".join(named.plan.roundings()) for named in plans.values()],
        "who does it": [named.about for named in plans.values()],
        "K's error": error.str.replace(" to ", "–"),
        f"K equal to PyTorch's, % {MARK}": equal.str.replace(" to ", "–"),
    }
    table = pd.DataFrame(columns, index=pd.Index(list(plans), name="plan"))
    return markdown(table.reset_index(), right=[name for name in columns if name.startswith("K")])


def conditions(folder: Path, run_id: str) -> str:
    """What the table's numbers are, and where they come from."""
    s, e = (load_runs(folder)[run_id][part] for part in ("settings", "environment"))
    drawn = "weights drawn to published statistics, **not the checkpoint**"
    weights = f"real weights ({s['checkpoint']})" if s["checkpoint"] else drawn
    native = "with" if e.get("native_bf16") else "without"
    machine = e["gpu"]["name"] if "gpu" in e else f"a CPU {native} bf16 instructions ({e['processor']})"
    return (
        "K's error: rms against float64, relative to its head, in units of what rounding to bf16 a single time costs; "
        "in brackets the least and the greatest layer. "
        f"{MARK} Hugging Face's eager bf16 on this machine. {s['model']}'s shape, "
        f"{len(s['layers'])} layers, {s['tokens']} tokens, {weights}; {machine}. {gpus(folder.parent)}"
    )


def gpus(results: Path) -> str:
    """One sentence on every folder of results that holds rows of a GPU, whatever its name."""
    found = []
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        if run := newest(folder):
            link = f"[{run.gpu}]({folder.as_posix()}/report.md#{anchor(gpu.HEADING)})"
            found.append(f"{link} (cut off after {run.reached})" if run.cut_off else link)
    return f"Times on a GPU: {', '.join(found)}." if found else "No kernel has run on a GPU yet, only its PTX on a CPU."


def readme_block(folder: Path, run_id: str) -> str:
    """What stands between the README's markers, from one run of a bench and the newest studies beside it."""
    frames = load(folder, run_id)
    said = "\n".join(finding.line(f"{folder.as_posix()}/report.md") for finding in findings(folder, frames))
    body = f"{headline(frames)}\n\n{conditions(folder, run_id)}\n\n{said}"
    return f"{BEGIN.format(folder=folder.as_posix(), run_id=run_id)}\n{body}\n{END}"


def update_readme(readme: Path, folder: Path) -> None:
    """Replaces the README's generated block by that of the newest run."""
    block = readme_block(folder, newest_run(folder))
    readme.write_text(BLOCK.sub(lambda _: block, readme.read_text()))
