"""Two machines that are taken away, one archive, and what a reader sees of it. Every time in here is scripted: the GPU
is named so, and all folders are temporary."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import fake_run
import pytest
import torch
from commands import ROOT
from fake_run import Timed, staged
from gpu_support import rows
from safetensors.torch import save_file

import castpoint.harness.gpu.run
from castpoint.harness import steps
from castpoint.harness.conformance import cuda, outputs
from castpoint.harness.gpu.order import order
from castpoint.harness.report import publish as publishing
from castpoint.harness.report.gpu import speed_table
from castpoint.harness.report.gpu_runs import newest
from castpoint.harness.report.plots import draw
from castpoint.harness.report.readme import gpus
from castpoint.harness.runs.archive import unpack
from castpoint.harness.runs.environment import sources
from castpoint.harness.runs.records import Records, load_runs
from castpoint.harness.runs.schema import KEYS
from castpoint.harness.runs.words import COMPARED, Step
from castpoint.kernels import dispatch

GPU = "scripted H100"
TABLES = ("gpu_steps", "gpu_checks", "gpu_limits", "gpu_speed", "tuning")


def environment() -> dict[str, object]:
    """As a copy of this tree without git says it."""
    gpu = {"name": GPU, "capability": "9.0", "multiprocessors": 132, "l2_bytes": 50_000_000}
    return {
        "device": "cuda",
        "commit": "unknown",
        "sources": sources(),
        "versions": {"torch": "no", "triton": "no"},
        "gpu": gpu,
    }


def opened(folder: Path, archive: Path, gpu: Timed) -> Records:
    records = Records(folder, {"command": "gpu"}, environment(), archive, gpu.now)
    records.note(command="gpu", narrowed_by={})
    return records


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """What is left of two machines that were killed after five minutes each: what the first had in the archive, the
    second's folder, and the archive that both wrote."""
    monkeypatch.setattr(fake_run, "NAME", GPU)
    run_until = staged(monkeypatch, tmp_path)
    without_point = castpoint.harness.gpu.run._without_point

    def with_outputs(step: Step, records: Records, gpu: Timed) -> None:
        without_point(step, records, gpu)
        if step == Step.OUTPUTS:
            save_file({"hf 0": torch.zeros(1)}, records.folder / cuda.OUTPUTS, {"inputs": cuda.inputs_digest()})

    monkeypatch.setattr(castpoint.harness.gpu.run, "_without_point", with_outputs)
    first, between, second = (tmp_path / "runs" / name for name in ("first", "between", "second"))
    archive = tmp_path / "out" / "gpu.tar.gz"
    assert not run_until(5, None, lambda gpu: opened(first, archive, gpu))
    unpack(archive, between)
    for table in TABLES:
        assert (first / f"{table}.csv").read_bytes().startswith((between / f"{table}.csv").read_bytes())
    shutil.rmtree(first)
    assert not run_until(5, None, lambda gpu: opened(second, archive, gpu))
    return between, second, archive


def test_a_second_machine_goes_on_and_everybody_sees_how_far_they_came(
    machines: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    between, second, archive = machines
    goes_on(between, second)
    unpack(archive, tmp_path / "home" / "h100")
    shown(tmp_path / "home" / "h100")
    published(archive, tmp_path, monkeypatch)


def goes_on(between: Path, second: Path) -> None:
    """Of one run: what the archive held, then more, in the order of worth, nothing twice."""
    for table in TABLES:
        before, after = ((folder / f"{table}.csv").read_bytes() for folder in (between, second))
        assert after.startswith(before), "the archive's rows are not those that the second machine began with"
        keys = Counter(tuple(row[name] for name in KEYS[table]) for row in rows(second, table))
        assert max(keys.values()) == 1, f"{table}: measured again"
    done = [(row["step"], row["model"], row["tokens"], row["regime"]) for row in rows(second, "gpu_steps")]
    assert done == [tuple(map(str, item.key.values())) for item in order()[: len(done)]]
    assert len(done) > len(rows(between, "gpu_steps")) + 10 and len(load_runs(second)) == 1


def shown(folder: Path) -> None:
    """Report, table, plot and README say how many points there are, and show these."""
    speed = rows(folder, "gpu_speed")
    points = {(row["regime"], row["model"], row["tokens"]) for row in speed}
    chains = {(row["regime"], row["model"], row["tokens"]) for row in speed if row["step"] == Step.CHAINS}
    said = f"{len(chains)} of 152 points"
    assert 16 < len(chains) < 152
    text = publishing.write(folder)
    assert str(folder / "report.md") in text and (folder / "plots" / "gpu_speedup.png").exists()
    text = (folder / "report.md").read_text()
    assert f"{GPU}, **cut off: {said}**: 132 processors" in text and "(plots/gpu_speedup.png)" in text
    table = speed_table(newest(folder))
    listed = [
        (weights.removesuffix(" (not cold)"), m, t) for weights, m, t in table.iloc[:, :3].itertuples(index=False)
    ]
    assert len(listed) == len(points) and set(listed) == points
    for point, line in zip(listed, table.itertuples(index=False), strict=True):
        assert ("µs" in line[3]) == (point in chains), "P1 has a time where chains were timed, and nowhere else"
    assert gpus(folder.parent) == (f"Times on a GPU: [{GPU}]({folder}/report.md#on-a-gpu) (cut off after {said}).")


def published(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`castpoint publish gpu.tar.gz` in a checkout of the same sources."""
    checkout = tmp_path / "checkout"
    shutil.copytree(ROOT / "results", checkout / "results", ignore=shutil.ignore_patterns("plots"))
    shutil.copy(ROOT / "README.md", checkout)
    (checkout / "kernels").mkdir()
    monkeypatch.chdir(checkout)
    monkeypatch.setattr(dispatch, "TABLE", Path("kernels", "dispatch.csv"))
    monkeypatch.setattr(publishing, "commit", lambda: "abcdef123456")
    monkeypatch.setattr(publishing, "draw", lambda folder, run_id: folder.name == "cpu" or draw(folder, run_id))
    found = {"share_equal": 0.99987, "max_ulp": 1.0}
    compared = {check: {"hf": found} for check in COMPARED}
    monkeypatch.setattr(outputs, "side_by_side", lambda *_: compared)  # which test_outputs.py shows
    said = steps.publish(archive)
    folder = Path("results", "h100")
    (run_id,) = load_runs(folder)
    assert said[0] == f"results/h100: run {run_id}, gpu, cut off"
    assert said[-2:] == [
        f"outputs of run {run_id} compared: 2 rows added to gpu_checks",
        f"wrote {len(table_rows())} configs of run {run_id} to kernels/dispatch.csv",
    ]
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert files == {*(f"{table}.csv" for table in TABLES), "environment.json", "report.md"}, "all else stays behind"
    text = (folder / "report.md").read_text()
    assert "| interpreter | hf | fused 64 x 64" in text and "| ptx | hf | fused 64 x 64" in text
    assert "**cut off: " in text and (folder / "plots" / "gpu_speedup.png").exists()
    assert f"[{GPU}](results/h100/report.md#on-a-gpu) (cut off after " in Path("README.md").read_text()


def table_rows() -> list[tuple[object, ...]]:
    """(shape, scale, tokens) of every config in the checkout's dispatch table, all of the scripted GPU."""
    table = dispatch.read_table(dispatch.TABLE)
    assert {gpu for gpu, _, _ in table} == {GPU} and {scale for _, _, scale in table} == {
        "prologue", "epilogue", "folded",
    }  # fmt: skip
    return [(shape, scale, tokens) for (_, shape, scale), configs in table.items() for tokens in configs]
