"""Which recorded figures hold on any machine, and which are of the one that measured them: said here, once.

The table of results/README.md is this one, and the marks in report.md and README.md follow it; the tests measure a
bench of one layer on two machines that one CPU can play, and hold it to them.
"""

from __future__ import annotations

from dataclasses import dataclass

MARK = "†"  # behind the name of a column whose figures another machine moves


@dataclass(frozen=True)
class Part:
    """Rows of a table: in words, and as a query of pandas (empty: all of them). holds: whether they are the same on any
    machine; None where nobody measured it."""

    table: str
    said: str
    holds: bool | None
    why: str
    rows: str = ""


SPEC = "float64 between the roundings, rounded once"
EAGER = "PyTorch's bf16 matmul, which adds in another order on another CPU; by how much: table `eager`"
NUMPY = "interpreted, a kernel sums by NumPy's BLAS: `share_equal` by 3.1e-5 between two CPUs; on a GPU by the GPU"
PYTORCH = "PyTorch's matmuls and its compiler's vectors: `share_equal` by 4.3e-4 between two CPUs"
KERNEL, INDUCTOR = "backend in ['triton', 'triton-separate']", "backend == 'inductor'"
PARTS = (
    Part("errors", "spec against `truth`", True, SPEC, "backend == 'spec' and reference == 'truth'"),
    Part("errors", "all that says `eager`", False, EAGER, "backend == 'eager' or reference == 'eager'"),
    Part("errors", "Triton against `truth` and `spec`", False, NUMPY, f"{KERNEL} and reference != 'eager'"),
    Part("errors", "Inductor against `truth` and `spec`", False, PYTORCH, f"{INDUCTOR} and reference != 'eager'"),
    Part("amplification", "all", True, SPEC),
    Part("k_norms", "drawn", True, SPEC, "weights == 'calibrated'"),
    Part("k_norms", "of a model", False, "on streams of eager, in a whole model", "weights != 'calibrated'"),
    Part("streams", "spec, but for `k_equal_eager`", True, SPEC, "backend == 'spec'"),
    Part("streams", "eager and kernels", False, "as under `errors`", "backend != 'spec'"),
    Part("channels", "all", True, SPEC),
    Part("ulps", "all", True, SPEC),
    Part("budget", "spec", True, SPEC, "backend == 'spec'"),
    Part("budget", "kernels", False, "the order of sums, as under `errors`", "backend != 'spec'"),
    Part("rope_positions", "all", True, SPEC),
    Part("eager", "all", False, "one row an instruction set; another make of CPU may add otherwise with the same"),
    Part("speed", "all", False, "times"),
    Part("audit", "all", True, "compilers for a GPU that is not there: they follow Triton's version"),
    Part("configs", "all", True, "the same"),
    Part("executed", "all", None, "PTX by NumPy's integers and float64; asked of one CPU"),
    Part("cases", "all", True, "to the digit on two machines that one CPU played"),
    Part("parallel", "all", False, "PyTorch's matmuls in a whole model; by how much was not measured"),
    Part("parallel_cost", "all", False, "times"),
    Part("gates", "all", None, "PyTorch's fp32 sums; asked of one CPU"),
    Part("tolerances", "all", None, "the same"),
    Part("four_bit", "drawn", True, SPEC, "weights == 'calibrated'"),
    Part("four_bit", "of a model", False, "on streams of eager, in a whole model", "weights != 'calibrated'"),
    Part("kl_statistics", "all", None, "whole models in float32 and bf16, by PyTorch's sums"),
    Part("claims", "all", None, "verdicts follow from `claim_figures`"),
    Part(
        "claim_figures",
        "all",
        None,
        "whole models in float32 and bf16, by PyTorch's sums; medians and ends of drawn ones",
    ),
    Part("implementations", "all", None, "other people's code as PyTorch runs it; `seconds` are times"),
    Part("captures", "all", None, "recorded values have intervals, and which plan lies in them is the same everywhere"),
    Part("fingerprints", "all", None, "answers come with a margin; `seconds` are times"),
    Part("model_layers", "all", False, "all is against eager, in a whole model; by how much was not measured"),
    Part("model_tokens", "all", False, "the same"),
    Part("model_dlogp", "all", False, "the same"),
    Part("engine", "all", False, "greedy text parts at near ties, which another CPU's sums decide otherwise"),
    Part("engine_runs", "all", False, "times"),
    Part("jax_stages", "all", False, "two libraries' sums and functions on that CPU"),
    Part("jax_causes", "all", False, "the same"),
    Part("jax_parts", "all", False, "the same"),
    *(Part(f"gpu_{what}", "all", False, "that GPU's") for what in ("checks", "limits", "counters", "steps", "speed")),
    Part("tuning", "all", False, "that GPU's"),
)
ANSWERS = {True: "yes", False: "no", None: "not measured"}


def of(table: str, holds: bool) -> list[Part]:
    """Parts of that table of which that is known."""
    return [part for part in PARTS if part.table == table and part.holds is holds]


def listing() -> str:
    """In Markdown, a row a part."""
    head = "| table | rows | hold on any machine | why, or by how much |\n|---|---|---|---|"
    rows = (f"| `{part.table}` | {part.said} | {ANSWERS[part.holds]} | {part.why} |" for part in PARTS)
    return "\n".join([head, *rows])
