"""The sweeps, small: every row they promise, failed cases as rows, no time for what is red or interpreted."""

import dataclasses
import itertools
import math
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import torch
from fake_cuda import FakeCuda

import castpoint.harness.accuracy.sweep
import castpoint.harness.timing.cpu
import castpoint.harness.timing.sweep
from castpoint.harness.accuracy.machines import Machines
from castpoint.harness.accuracy.sweep import problem_at, sweep_kernels, sweep_precision
from castpoint.harness.problems.geometry import geometry_named, layer_work
from castpoint.harness.report.findings import findings
from castpoint.harness.report.k_norms import k_norm_table
from castpoint.harness.report.page import limits, write_report
from castpoint.harness.report.plots import draw
from castpoint.harness.runs.environment import describe, last_cache_bytes
from castpoint.harness.runs.frames import load
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import KEYS
from castpoint.harness.runs.words import Status
from castpoint.harness.timing.cpu import Ceilings, interleaved_times, rotating, work_of
from castpoint.harness.timing.rig import Outcome
from castpoint.harness.timing.sweep import sweep_speed
from castpoint.variants.catalogue import PLANS

CPU = Settings(
    layers=(0, 1),
    tokens=8,
    kernel_tokens=4,
    speed_tokens=(1, 4),
    plans=("hf", "fp32", "gemma"),
    speed_budget_s=0.1,
)


def records_for(folder: Path, settings: Settings) -> Records:
    return Records(folder, vars(settings), describe("cpu"))


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    records = records_for(folder, CPU)
    sweep_precision(CPU, records)
    sweep_kernels(CPU, records)
    sweep_speed(CPU, records)
    records.finish()
    return folder


def test_every_promised_error_row(run: Path) -> None:
    errors = table(run, "errors")
    assert set(errors["status"]) == {"ok"}
    for plan in CPU.plans:
        rows = errors[(errors["plan"] == plan) & (errors["backend"] == "spec")]
        assert set(rows["layer"]) == {0, 1}
        assert set(rows["output"]) == {"q", "k", "v", "k_proj"} and set(rows["reference"]) == {"truth", "eager"}
        for backend in ("triton", "inductor"):
            rows = errors[(errors["plan"] == plan) & (errors["backend"] == backend)]
            assert set(rows["reference"]) == {"truth", "eager", "spec"} and set(rows["output"]) == set("qkv")
    floor = table(run, "eager").query("status == 'ok' and backend == 'eager, batch of 1'")
    assert set(floor["layer"]) == {0, 1} and set(floor["plan"]) == {"hf"}
    keys = ["weights", "layer", "tokens", "plan", "backend", "output", "reference"]
    assert not errors.duplicated(keys).any()


def test_amplification_has_every_layer_and_plan(run: Path) -> None:
    amplification = table(run, "amplification")
    assert [*zip(amplification["layer"], amplification["plan"], strict=True)] == [*itertools.product((0, 1), CPU.plans)]
    assert set(amplification[amplification["layer"] == 0]["k_norm_max"]) == {96.5}


def test_what_one_draw_says_is_not_taken_for_all(run: Path) -> None:
    """Twenty draws; the first is the run's own, and their range is that of the ratios, not a ratio of ranges."""
    rows, amplification = table(run, "k_norms"), table(run, "amplification")
    by_arm = rows.groupby(["q_norm", "k_norm"], sort=False)["sample"].apply(list)
    assert len(by_arm) == 7 and all(samples == list(range(20)) for samples in by_arm) and set(rows["layer"]) == {0}
    first = rows[(rows["sample"] == 0) & (rows["q_norm"] == "own") & (rows["k_norm"] == "own")].iloc[0]
    own = amplification[(amplification["plan"] == "hf") & (amplification["layer"] == 0)].iloc[0]
    same = {"k_norm_there": "k_norm_max", "k_max_abs": "k_max_abs_after", "k_rel_rms": "k_rel_rms_after"}
    for column in (*same, "logit_rms_error", "softmax_tv_mean", "top_key_flips"):
        assert first[column] == own[same.get(column, column)], column
    by_seed = rows[rows["q_norm"] == "own"].pivot(index="sample", columns="k_norm", values="logit_rms_error")
    ratios = (by_seed["own"] / by_seed["near 1"]).quantile([0.1, 0.5, 0.9]).tolist()
    assert ratios[2] > 1.5 * ratios[0]
    frames = load(run, rows["run_id"][0])
    (finding,) = (f for f in findings(run, frames) if "96.5 among them" in f.text)
    assert f"rms error by {ratios[0]:.3g} to {ratios[2]:.3g}, their relative" in finding.text
    cells = k_norm_table(frames["k_norms"]).set_index("measure; K-norm weights:").loc["logits, rms error: multiple"]
    assert cells["own"] == f"{ratios[1]:.3g} ({ratios[0]:.3g} to {ratios[2]:.3g})" and cells["near 1"] == "1"


def test_times_are_measured_and_consistent(run: Path) -> None:
    speed = table(run, "speed")
    assert set(zip(speed["plan"], speed["backend"], strict=True)) == {
        ("hf", "eager"),
        ("hf", "torch.compile"),
        *((plan, "inductor") for plan in CPU.plans),
    }
    assert (speed["backend"] != "triton").all(), "interpreted code was timed"
    for row in speed.itertuples():
        assert 0 < row.p10_us <= row.p50_us <= row.p90_us
        assert row.gbps == pytest.approx(row.bytes / row.p50_us / 1e3, rel=1e-4)
        assert row.tflops == pytest.approx(row.flops / row.p50_us / 1e6, rel=1e-4)
        assert row.roofline_share > 0 and "of weights in rotation" in row.regime
    for _tokens, rows in speed.groupby("tokens"):
        eager = rows[rows["backend"] == "eager"].iloc[0]
        assert eager["speedup_vs_eager"] == 1
        other = rows[rows["backend"] == "inductor"].iloc[0]
        assert other["speedup_vs_eager"] == pytest.approx(eager["p50_us"] / other["p50_us"], rel=1e-4)


def test_bytes_and_flops_by_hand() -> None:
    problem = problem_at(CPU, 0, 3)
    work = work_of(problem)
    assert work.flops == 2 * 3 * 1024 * 4096
    assert work.bytes == 2 * (3 * 1024 + 4096 * 1024 + 1024 + 3 * 4096 + 128 + 128)
    assert work == layer_work(geometry_named("qwen3-0.6b"), 3), "by sizes alone"
    slow_memory, slow_matmul = Ceilings(1e6, 1e15, 1e12), Ceilings(1e15, 1e6, 2e6)
    assert slow_memory.floor_s(work) == work.bytes / 1e6
    assert slow_matmul.floor_s(work) == work.flops / 2e6


@pytest.mark.parametrize(("flops_per_s", "largest"), [(2.0**30, 512), (2.0**37, 2048)])
def test_a_matmul_that_would_take_a_minute_is_measured_on_smaller_matrices(
    flops_per_s: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where PyTorch has no fast bf16 for the CPU, and where it has."""
    cpu, sizes = castpoint.harness.timing.cpu, []

    def median_s(matmul: partial) -> float:
        a, b = matmul.args
        assert a.dtype == b.dtype == torch.bfloat16 and a.shape == b.shape
        sizes.append(len(a))
        return 2 * len(a) ** 3 / flops_per_s

    monkeypatch.setattr(cpu, "_median_s", median_s)
    assert cpu._matmul_flops_per_s(torch.bfloat16) == flops_per_s and sizes[-1] == largest


def test_report_and_plots_are_drawn_from_the_records(run: Path) -> None:
    run_id = Records(run, {"other": 1}, {}).runs.keys().__iter__().__next__()
    drawn = {path.stem for path in draw(run, run_id)}
    assert drawn == {"plans", "layers", "gain", "ulps", "time"}
    assert all((run / "plots" / f"{name}.png").stat().st_size > 5000 for name in drawn)
    text = write_report(run, run_id).read_text()
    assert "not the checkpoint" in text and "nan" not in text
    assert f"{float(table(run, 'speed')['p50_us'].iloc[0]):,.0f}" in text


@pytest.mark.parametrize("stop_after", [5, 100, 170])
def test_a_continued_run_measures_only_what_is_missing(tmp_path: Path, monkeypatch, stop_after: int) -> None:
    settings = dataclasses.replace(CPU, layers=(0,), plans=("hf",))
    monkeypatch.setattr(castpoint.harness.accuracy.sweep, "DRAWS", 2)
    environment = describe("cpu") | {"commit": "clean"}
    left = [stop_after]
    add = Records.add

    def stopping(self: Records, *args: object, **kwargs: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        add(self, *args, **kwargs)

    records = Records(tmp_path, vars(settings), environment)
    monkeypatch.setattr(Machines, "played", {})  # seconds a process
    monkeypatch.setattr(Records, "add", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep_precision(settings, records)
    monkeypatch.setattr(Records, "add", add)
    before = {path.stem: path.read_text() for path in tmp_path.glob("*.csv")}
    again = Records(tmp_path, vars(settings), environment)
    assert again.run_id == records.run_id
    sweep_precision(settings, again)
    for name, keys in KEYS.items():
        if not (tmp_path / f"{name}.csv").exists():
            continue
        rows = table(tmp_path, name)
        assert (tmp_path / f"{name}.csv").read_text().startswith(before.get(name, ""))
        assert not rows.duplicated(list(keys)).any(), name
    assert len(table(tmp_path, "channels")) == 128 and len(table(tmp_path, "ulps")) == 17
    assert set(table(tmp_path, "errors").query("backend == 'spec'")["output"]) == {"q", "k", "v", "k_proj"}


def test_a_kernel_that_fails_is_a_row_and_the_sweep_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(CPU, layers=(0,), plans=("hf", "fp32"))
    real = castpoint.harness.accuracy.sweep.run

    def failing(plan: object, problem: object, backend: str) -> object:
        if backend == "inductor" and plan == PLANS["hf"].plan:
            raise RuntimeError("no compiler\nfound")
        return real(plan, problem, backend)

    monkeypatch.setattr(castpoint.harness.accuracy.sweep, "run", failing)
    records = records_for(tmp_path, settings)
    sweep_kernels(settings, records)
    errors = table(tmp_path, "errors")
    failed = errors[errors["status"] == "failed"]
    assert list(failed["reason"]) == ["RuntimeError: no compiler found"]
    assert len(errors[(errors["plan"] == "fp32") & (errors["backend"] == "inductor")]) == 9


@pytest.mark.parametrize("fault", ["moved boundary", "one wrong element", "nan"])
def test_a_wrong_kernel_is_red_and_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    settings = dataclasses.replace(CPU, layers=(0,), plans=("hf",), speed_tokens=(1,))
    real = castpoint.harness.accuracy.sweep.run

    def wrong(plan: object, problem: object, backend: str) -> object:
        if backend != "inductor":
            return real(plan, problem, backend)
        q, k, v = real(PLANS["one-rounding"].plan if fault == "moved boundary" else plan, problem, backend)
        if fault != "moved boundary":
            k = k.clone()
            k[0, 0, 0] = math.nan if fault == "nan" else k[0, 0, 0] * 1.5
        return q, k, v

    monkeypatch.setattr(castpoint.harness.accuracy.sweep, "run", wrong)
    records = records_for(tmp_path, settings)
    sweep_kernels(settings, records)
    errors = table(tmp_path, "errors")
    red = errors[errors["status"] == "red"]
    assert set(red["backend"]) == {"inductor"} and "outside the envelope" in red["reason"].iloc[0]
    sweep_speed(settings, records)
    speed = table(tmp_path, "speed")
    row = speed[speed["backend"] == "inductor"].iloc[0]
    assert row["status"] == "red" and row["p50_us"] == "" and "not timed" in row["reason"]


def test_a_checkpoint_runs_and_plans_that_do_not_fit_it_say_so(tmp_path: Path) -> None:
    sample = Path(__file__).parents[1] / "data" / "qwen2.5-coder-0.5b-layer0.safetensors"
    settings = dataclasses.replace(CPU, model="qwen2.5-0.5b", checkpoint=str(sample), layers=(0,))
    records = records_for(tmp_path, settings)
    sweep_precision(settings, records)
    sweep_kernels(settings, records)
    errors = table(tmp_path, "errors")
    assert set(errors[errors["plan"] == "gemma"]["status"]) == {"not applicable"}
    fitting = errors[errors["plan"] != "gemma"]
    assert set(fitting["status"]) == {"ok"} and set(fitting["weights"]) == {"checkpoint"}
    assert set(fitting["output"]) == set("qkv"), "Qwen2.5 has no head norm, so no K before it"
    assert not (tmp_path / "amplification.csv").exists()


def test_threads_are_restored_after_the_noise_floor(run: Path) -> None:
    assert torch.get_num_threads() == describe("cpu")["threads"] > 0


def test_calls_of_all_arms_rotate_through_the_same_weights() -> None:
    """An arm must not find the weights in the cache that another arm has just read."""
    read: list[int] = []
    turn = itertools.cycle(range(5))
    arms = {name: rotating(read.append, turn) for name in ("a", "b")}
    interleaved_times(arms, 0.0)
    assert read[:12] == [0, 1, 2, 3, 4] * 2 + [0, 1] and len(read) >= 2 * 10


def test_rotation_exceeds_three_times_the_last_cache() -> None:
    problems = castpoint.harness.timing.sweep._rotation([problem_at(CPU, 0, 1)], CPU, None)
    assert sum(p.qkv_weight.numel() * 2 for p in problems) > 3 * last_cache_bytes("cpu")
    assert len({p.qkv_weight.data_ptr() for p in problems}) == len(problems)


def test_a_gpu_rotates_what_fits_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 8,388,608 bytes, 3 caches of 4 of them; at 16 tokens an arm's outputs of a copy are 2 x 131,072."""
    sweep, layers = castpoint.harness.timing.sweep, [problem_at(CPU, 0, 16), problem_at(CPU, 1, 16)]
    monkeypatch.setattr(sweep, "last_cache_bytes", lambda device: 4 * 8_388_608)
    assert len(sweep._rotation(layers, CPU, FakeCuda())) == 13
    short = FakeCuda(free=10 * 8_388_608)  # 7.5 weights
    folding = dataclasses.replace(CPU, plans=("hf", "folded"))
    assert len(sweep._rotation(layers, CPU, short)) == 7 and len(sweep._rotation(layers, folding, short)) == 3
    assert sweep._rotation(layers, CPU, FakeCuda(free=0)) == layers[:1]
    problems = layers * 7
    assert sweep._copies(problems, 3, None) == sweep._copies(problems, 3, FakeCuda()) == 14
    assert sweep._copies(problems, 3, FakeCuda(free=16 * 4 * 2 * 131_072)) == 12, "3 arms and the first one again"
    assert sweep._copies(problems, 23, FakeCuda(free=16 * 4 * 2 * 131_072)) == 2


def test_a_row_says_where_too_few_weights_rotate(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep, layers = castpoint.harness.timing.sweep, [problem_at(CPU, 0, 4), problem_at(CPU, 1, 4)]
    monkeypatch.setattr(sweep, "last_cache_bytes", lambda device: 4_000_000)
    outcomes = {str(sweep.BASELINE): Outcome(Status.FAILED, "no memory")}
    regimes = [sweep._speed_row(CPU, sweep.BASELINE, layers[:n], outcomes, Ceilings(1.0, 1.0)).regime for n in (2, 1)]
    assert regimes == ["cold: 17 MB of weights in rotation", "weights not cold: 8 MB of weights in rotation"]
    speed = pd.DataFrame({"regime": [regimes[0], *regimes, regimes[1]], "tokens": [1, 4, 64, 128]})
    run = {"ceilings": {"bytes_per_s": 1e9, "bf16_flops_per_s": 1e12}, "load_average": 0, "environment": {"threads": 1}}
    assert f"{regimes[0]} at 1, 4 tokens; {regimes[1]} at 64, 128 tokens. Load" in limits(run, speed)
    assert f"faster. {regimes[0]}. Load" in limits(run, speed[:2])
