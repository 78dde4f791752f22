"""Eager on every instruction set that this CPU plays; and what is said to hold on any machine, measured on two."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from support import ROOT

from castpoint.harness.accuracy import machines
from castpoint.harness.accuracy.machines import PLAYED, Machines, Played
from castpoint.harness.accuracy.sweep import sweep_precision
from castpoint.harness.problems.drawn import problem_at
from castpoint.harness.runs import holds
from castpoint.harness.runs.environment import ISAS, matmul_arithmetic
from castpoint.harness.runs.frames import Frames, load
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import TABLES
from castpoint.variants.eager import eager
from castpoint.variants.problem import Problem

SETTINGS = Settings(layers=(0,), tokens=16, plans=("hf", "one-rounding", "gemma"))
PROBLEMS = [(0, "hf")]
OWN = matmul_arithmetic()["onednn_isa"]
BELOW = machines._below(OWN)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Frames:
    folder = tmp_path_factory.mktemp("machines")
    records = Records(folder, vars(SETTINGS), {})
    sweep_precision(SETTINGS, records)
    return load(folder, records.run_id)


def rows(folder: Path, settings: Settings = SETTINGS) -> list[dict[str, str]]:
    records = Records(folder, vars(settings), {})
    Machines(settings, records, PROBLEMS).played  # noqa: B018
    return records.rows("eager")


# ---------------------------------------------------------------- eager on instruction sets


def test_every_instruction_set_has_its_rows_or_says_why_not(frames: Frames) -> None:
    eager_rows = frames["eager"]
    played = eager_rows[eager_rows["status"] == "ok"]
    assert set(played["isa"]) == {OWN, *BELOW} and played.groupby("isa")["kernel"].nunique().eq(1).all()
    assert played["kernel"].nunique() == len({OWN, *BELOW}), "each multiplies by another kernel"
    left = eager_rows[eager_rows["status"] != "ok"]
    assert set(left["isa"]) == set(PLAYED) - set(played["isa"]) if OWN in PLAYED else not len(left)
    assert set(left["reason"]) <= {f"this CPU has {OWN} at most"} and set(left["status"]) <= {"not applicable"}
    for isa, here in played.groupby("isa"):
        specs = here[here["backend"] == "spec"]
        assert list(specs["plan"]) == ["hf", "one-rounding", "gemma"]
        own = {"eager, batch of 1", "eager, 1 thread", "eager, 2 threads", "eager, 4 threads"}
        assert own <= set(here["backend"]), isa


def test_the_own_instruction_set_is_that_of_the_other_tables(frames: Frames) -> None:
    """What a process of its own finds is what this one finds: the plans' shares of errors.csv, and its own floor."""
    here = frames["eager"].query(f"isa == '{OWN}'").set_index(["backend", "plan"])
    errors = frames["errors"].query("reference == 'eager' and output == 'k'").set_index("plan")
    for plan in SETTINGS.plans:
        for column in ("share_equal", "rel_rms", "max_ulp", "max_abs"):
            assert here.loc[("spec", plan), column] == errors.loc[plan, column]
    problem = problem_at(SETTINGS, 0, 16, "hf")
    tokens = torch.cat([eager(problem.replace(x=row))[1] for row in problem.x.split(1)])
    share = (tokens == eager(problem)[1]).double().mean().item()
    assert here.loc[("eager, batch of 1", "hf"), "share_equal"] == pytest.approx(share, rel=1e-5)


def test_a_batch_and_a_number_of_threads_that_change_bits_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an eager whose K is made of its batch and its threads."""

    def changing(problem: Problem) -> tuple[torch.Tensor, ...]:
        k = torch.full((problem.tokens, 1, 2), 8.0 * torch.get_num_threads() + (problem.tokens == 1))
        return k, k, k

    monkeypatch.setattr(machines, "eager", changing)
    threads, problem = torch.get_num_threads(), problem_at(SETTINGS, 0, 3, "hf")
    found = {row["backend"]: row["share_equal"] for row in machines._against_itself(problem, changing(problem)[1])}
    assert found.pop("eager, batch of 1") == 0 and len(found) == 3
    assert {name: int(share) for name, share in found.items()} == {
        f"eager, {count} thread{'s' * (count > 1)}": int(count == threads) for count in (1, 2, 4)
    }
    assert torch.get_num_threads() == threads


def test_a_plan_is_compared_with_each_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_at(SETTINGS, 0, 1, "hf")
    name, k = f"layer 0, {problem.weights}", torch.ones(1, 8, 128)
    found = {isa: Played(isa, {name: k * value}, {}, {}, []) for value, isa in enumerate(("zeros", "ones", "twos"))}
    monkeypatch.setattr(Machines, "played", found)
    compared = Machines(SETTINGS, Records(tmp_path, {}, {}), PROBLEMS).compared(problem, "fp32", k)
    shares = [(row.isa, row.kernel, row.plan, row.backend, row.share_equal) for row in compared]
    assert shares == [(isa, isa, "fp32", "spec", float(isa == "ones")) for isa in ("zeros", "ones", "twos")]


@pytest.mark.parametrize(
    ("own", "below"),
    [
        ("avx2", []),
        ("avx512_core", ["avx2"]),
        ("avx512_core_amx", ["avx2", "avx512_core", "avx512_core_bf16"]),
        ("avx512_core_vnni", ["avx2", "avx512_core"]),
        ("cuda", []),
    ],
)
def test_what_a_cpu_can_play(own: str, below: list[str]) -> None:
    assert machines._below(own) == below and machines._limits(own, own) == {}
    assert set(PLAYED) <= set(ISAS), "in oneDNN's words"


def played(kernel: str = "a", inputs: str = "same") -> Played:
    name = "layer 0, calibrated"
    key = {"model": "m", "weights": "calibrated", "layer": 0, "tokens": 1, "seed": 0, "plan": "hf"}
    return Played(kernel, {name: torch.ones(1, 1, 2)}, {name: inputs}, {name: key}, [])


def faked(monkeypatch: pytest.MonkeyPatch, *found: Played | Exception) -> None:
    """A CPU with avx512_core, whose two processes give these."""
    left = iter(found)

    def play(*args: object) -> Played:
        if isinstance(answer := next(left), Exception):
            raise answer
        return answer

    monkeypatch.setattr(machines, "_play", play)
    monkeypatch.setattr(machines, "_own", lambda device: "avx512_core")


def test_a_limit_that_was_not_taken_is_no_second_instruction_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, played(), played())
    (row, *_) = rows(tmp_path)
    assert (row["isa"], row["status"]) == ("avx2", "not applicable") and "a multiplies, as under avx512" in row[
        "reason"
    ]


def test_other_inputs_are_not_taken_for_another_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faked(monkeypatch, played(), played("b", "others"))
    (row, *_) = rows(tmp_path)
    assert row["status"] == "failed" and row["reason"] == "other inputs were drawn: layer 0, calibrated"


def test_an_instruction_set_that_dies_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faked(monkeypatch, RuntimeError("exit status -4: illegal instruction"), played())
    found = {row["isa"]: (row["status"], row["reason"]) for row in rows(tmp_path)}
    assert found.pop("avx512_core") == ("failed", "exit status -4: illegal instruction")
    assert set(found) == {"avx512_core_bf16", "avx512_core_amx"}, "above it"


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machines, "_below", lambda own: [])
    (row, *_) = rows(tmp_path, dataclasses.replace(SETTINGS, checkpoint=str(tmp_path / "nowhere")))
    assert row["status"] == "failed" and "nowhere" in row["reason"]


# ---------------------------------------------------------------- what holds on any machine

HERE = {"OMP_NUM_THREADS": "1"}
ELSEWHERE = {  # other sums in every library that adds: oneDNN, PyTorch's own loops, MKL, NumPy's BLAS
    **{"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "2"},
    **{"MKL_CBWR": "COMPATIBLE", "OPENBLAS_CORETYPE": "Haswell"},
}
MEASURE = """
import sys
from dataclasses import replace
from pathlib import Path
from castpoint.harness.accuracy import machines, sweep
from castpoint.harness.accuracy.budget import sweep_budget
from castpoint.harness.accuracy.rope_positions import sweep_rope_positions
from castpoint.harness.runs.records import Records, Settings

machines.Machines.played = {}
settings = Settings(layers=(0,), tokens=16, kernel_tokens=1, plans=("hf", "bf16-operand", "gemma"))
records = Records(Path(sys.argv[1]), vars(settings), {})
sweep.sweep_precision(settings, records)
sweep_budget(replace(settings, plans=("bf16-operand",)), records)
sweep_rope_positions(settings, records)
"""


def measured(folder: Path, machine: dict[str, str]) -> dict[str, pd.DataFrame]:
    """Tables as they stand on disk, in words, on that machine."""
    environment = {**os.environ, **machine, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", MEASURE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    tables = {path.stem: pd.read_csv(path, keep_default_na=False, dtype=str) for path in folder.glob("*.csv")}
    return {table: frame.drop(columns="run_id") for table, frame in tables.items()}


Two = tuple[dict[str, pd.DataFrame], dict[str, pd.DataFrame]]


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory: pytest.TempPathFactory) -> Two:
    here, elsewhere = (tmp_path_factory.mktemp(name) for name in ("here", "elsewhere"))
    return measured(here, HERE), measured(elsewhere, ELSEWHERE)


def part_rows(frame: pd.DataFrame, part: holds.Part) -> pd.DataFrame:
    return frame.query(part.rows) if part.rows else frame


def moved(two: Two, part: holds.Part) -> int:
    """How many rows of that part differ in a letter between the two machines."""
    one, other = (part_rows(tables[part.table], part) for tables in two)
    assert len(one) == len(other) > 0, part
    return int((one.to_numpy() != other.to_numpy()).any(axis=1).sum())


MEASURED = ("errors", "amplification", "k_norms", "channels", "ulps", "budget", "rope_positions")
HOLDING = [part for table in MEASURED for part in holds.of(table, True)]


@pytest.mark.skipif(not BELOW, reason="this CPU plays no second instruction set")
@pytest.mark.parametrize("part", HOLDING, ids=lambda part: f"{part.table}, {part.said}")
def test_what_holds_on_any_machine_is_the_same_on_two(two_machines: Two, part: holds.Part) -> None:
    assert moved(two_machines, part) == 0


@pytest.mark.skipif(not BELOW, reason="this CPU plays no second instruction set")
def test_the_two_machines_do_differ(two_machines: Two) -> None:
    """In what is of a machine: eager, and what is against it. So a wrong word in the list is noticed."""
    (of_eager,) = (part for part in holds.of("errors", False) if "eager" in part.said)
    assert moved(two_machines, of_eager) > 10


def test_every_published_row_is_of_one_part() -> None:
    assert {part.table for part in holds.PARTS} == set(TABLES)
    for path in (ROOT / "results" / "cpu").glob("*.csv"):
        table, frame = path.stem, pd.read_csv(path, keep_default_na=False, dtype=str)
        parts = [part for part in holds.PARTS if part.table == table]
        assert sum(len(part_rows(frame, part)) for part in parts) == len(frame), table


def test_the_page_on_results_has_this_list() -> None:
    assert holds.listing() in (ROOT / "results" / "README.md").read_text()
