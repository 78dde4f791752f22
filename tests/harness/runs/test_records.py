"""Records: appended and flushed, continued after a stop, and never mixed with another schema."""

import csv
import json
from pathlib import Path

import pytest

from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.frames import load_table
from castpoint.harness.runs.records import SCHEMA, Records, load_runs
from castpoint.harness.runs.schema import KEYS, ROWS, TABLES, ErrorRow, TuningRow, flags_of, words_of
from castpoint.harness.runs.words import Status

SETTINGS, ENVIRONMENT = {"model": "m"}, {"device": "cpu"}
KEY = {
    "model": "m",
    "seed": 0,
    "weights": "w",
    "layer": 0,
    "tokens": 4,
    "plan": "hf",
    "backend": "spec",
    "output": "k",
    "reference": "truth",
}


def rows(folder: Path, table: str = "errors") -> list[dict[str, str]]:
    with open(folder / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_columns_are_those_that_tools_rely_on() -> None:
    assert ",".join(TABLES["errors"]) == (
        "run_id,model,weights,layer,tokens,seed,plan,backend,output,reference,max_abs,mean_abs,rms,"
        "rel_rms,max_ulp,p99_ulp,mean_ulp,share_equal,signed_mean,at_token,at_head,at_channel,status,reason"
    )
    assert ",".join(TABLES["speed"]) == (
        "run_id,model,tokens,plan,backend,regime,p10_us,p50_us,p90_us,bytes,flops,gbps,tflops,roofline_share,"
        "speedup_vs_eager,speedup_vs_compile,status,reason"
    )
    assert ",".join(TABLES["amplification"]) == (
        "run_id,model,weights,layer,plan,k_norm_max,gain_predicted_max,gain_measured_max,k_max_abs_before,"
        "k_max_abs_after,k_rel_rms_before,k_rel_rms_after,logit_rms_error,logit_max_error,softmax_tv_mean,"
        "softmax_tv_max,top_key_flips,status,reason"
    )
    assert all(set(KEYS[table]) <= set(TABLES[table]) for table in TABLES)


def test_a_row_is_on_disk_as_soon_as_it_is_added(tmp_path: Path) -> None:
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    records.add(ErrorRow(**KEY, max_abs=0.125, reason="two\nlines"))
    (row,) = rows(tmp_path)
    assert row["run_id"] == records.run_id and row["max_abs"] == "0.125" and row["status"] == "ok"
    assert row["reason"] == "two lines" and row["rms"] == ""
    assert records.has(ErrorRow, **KEY) and not records.has(ErrorRow, **KEY | {"plan": "fp32"})


def test_a_stopped_run_is_continued_and_a_finished_one_is_not(tmp_path: Path) -> None:
    first = Records(tmp_path, SETTINGS, ENVIRONMENT)
    first.add(ErrorRow(**KEY))
    again = Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert again.run_id == first.run_id and again.has(ErrorRow, **KEY)
    again.finish()
    fresh = Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert fresh.run_id != first.run_id and not fresh.has(ErrorRow, **KEY)
    fresh.add(ErrorRow(**KEY))
    assert len(rows(tmp_path)) == 2 and len(fresh.rows("errors")) == 1
    assert list(load_runs(tmp_path)) == [first.run_id, fresh.run_id]


def test_a_table_begins_with_its_first_row_and_is_empty_before(tmp_path: Path) -> None:
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]
    assert records.rows("errors") == [] and not len(load_table(tmp_path, records.run_id, "errors"))
    records.add(ErrorRow(**KEY))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["environment.json", "errors.csv"]
    assert (tmp_path / "errors.csv").read_text().splitlines()[0] == ",".join(TABLES["errors"])


# ---------------------------------------------------------------- which run is continued

GPU = {
    "device": "cuda", "processor": "one", "threads": 8, "cpu_capability": "AVX2", "onednn": True, "onednn_isa": "avx2",
    "native_bf16": False, "python": "3.12.3", "commit": "c0ffee", "sources": "abc", "dispatch": "none",
    "versions": {"torch": "2.11.0", "triton": "3.6.0", "numpy": "2.0"},
    "gpu": {"name": "invented", "driver": "575", "cuda": "13.0", "multiprocessors": 132, "memory_bytes": 80},
}  # fmt: skip
CPU = GPU | {"device": "cpu"}
del CPU["gpu"]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ENVIRONMENT, {"device": "cuda"}),
        *((CPU, CPU | changed) for changed in ({"processor": "two"}, {"threads": 1}, {"sources": "abd"},
                                               {"dispatch": "123"}, {"python": "3.12.4"})),
        (GPU, GPU | {"sources": "abd"}),
        *((GPU, GPU | {"versions": GPU["versions"] | changed}) for changed in ({"torch": "2.12"}, {"triton": "3.7"})),
        *((GPU, GPU | {"gpu": GPU["gpu"] | changed}) for changed in ({"name": "other"}, {"driver": "580"},
                                                                   {"cuda": "12.9"}, {"multiprocessors": 16})),
        ({name: fact for name, fact in CPU.items() if name != "sources"}, CPU),  # a run before there were sources
    ],
)  # fmt: skip
def test_other_code_and_another_machine_start_another_run(tmp_path: Path, before: dict, after: dict) -> None:
    first = Records(tmp_path, SETTINGS, before)
    assert Records(tmp_path, SETTINGS, after).run_id != first.run_id
    assert Records(tmp_path, SETTINGS | {"model": "n"}, before).run_id != first.run_id
    assert not any("continued_on" in run for run in load_runs(tmp_path).values())


@pytest.mark.parametrize("commit", ["c0ffee", "c0ffee+", "unknown"])
def test_a_dirty_tree_continues_its_own_run(tmp_path: Path, commit: str) -> None:
    first = Records(tmp_path, SETTINGS, CPU | {"commit": commit})
    assert Records(tmp_path, SETTINGS, CPU | {"commit": commit}).run_id == first.run_id
    assert "continued_on" not in load_runs(tmp_path)[first.run_id]


def test_a_gpu_run_goes_on_beside_another_cpu_and_says_so(tmp_path: Path) -> None:
    first = Records(tmp_path, SETTINGS, GPU)
    others = [
        GPU | {"processor": "two", "threads": 4, "native_bf16": True, "onednn_isa": "avx512_core", "dispatch": "123"},
        GPU | {"commit": "unknown", "gpu": GPU["gpu"] | {"memory_bytes": 79}},
    ]
    for other in (GPU, *others, others[0], GPU):
        assert Records(tmp_path, SETTINGS, other).run_id == first.run_id
    (run,) = load_runs(tmp_path).values()
    assert run["environment"] == GPU and run["continued_on"] == others


# ---------------------------------------------------------------- rows


def test_half_a_row_left_by_a_killed_run_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    records.add(ErrorRow(**KEY))
    with open(tmp_path / "errors.csv", "a") as file:
        file.write(f"{records.run_id},qwen3-0.6b,calibr")
    again = Records(tmp_path, SETTINGS, ENVIRONMENT)
    again.add(ErrorRow(**KEY | {"plan": "fp32"}))
    assert [row["plan"] for row in rows(tmp_path)] == ["hf", "fp32"]


def test_half_a_row_is_no_row_for_readers_either(tmp_path: Path) -> None:
    """Of a folder that no run opens again. Where the half is of the first line, there is no row at all."""
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    records.add(ErrorRow(**KEY))
    with open(tmp_path / "errors.csv", "a") as file:
        file.write(f"{records.run_id},qwen3-0.6b,calibr")
    (tmp_path / "speed.csv").write_text(",".join(TABLES["speed"])[:40])
    assert len(load_table(tmp_path, records.run_id, "errors")) == len(records.rows("errors")) == 1
    assert len(load_table(tmp_path, records.run_id, "speed")) == len(records.rows("speed")) == 0
    Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert not (tmp_path / "speed.csv").exists() and (tmp_path / "errors.csv").read_text().endswith("\n")


def test_a_row_is_written_once(tmp_path: Path) -> None:
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    records.add(ErrorRow(**KEY, rms=1.0))
    records.add(ErrorRow(**KEY, rms=2.0))
    assert [row["rms"] for row in rows(tmp_path)] == ["1"]


def test_what_no_reader_knows_is_no_row() -> None:
    for wrong in ({"speed": 1}, {}):
        with pytest.raises(TypeError):  # a column that is none, a key that is not whole
            ErrorRow(**({**KEY, **wrong} if wrong else {"plan": "hf"}))
    with pytest.raises(ValueError, match="'fine' is not a valid Status"):
        ErrorRow(**KEY, status="fine")
    with pytest.raises(KeyError, match="reference"):
        ErrorRow.key_of(**{name: value for name, value in KEY.items() if name != "reference"})


def test_every_column_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Words as words, numbers as numbers, True and False as such; what is empty is no number and no truth."""
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    sizes = {"block_m": 1, "block_k": 2, "num_warps": 4, "num_stages": 5, "splits": 6}
    words = {"model": "m", "scale": "folded", "kernel": "fused", "prepass": "none"}
    for config, cold in (("007", True), ("8", False)):
        records.add(TuningRow(**words, **sizes, tokens=1, config=config, cold=cold, status=Status.RED))
    frame = load_table(tmp_path, records.run_id, "tuning")
    assert list(frame["config"]) == ["007", "8"] and list(frame["cold"]) == [True, False]
    assert list(frame[~frame["cold"]]["config"]) == ["8"]
    assert list(frame["block_k"]) == [2, 2] and frame["p50_us"].isna().all() and set(frame["status"]) == {Status.RED}
    for table in ROWS:
        numbers = set(TABLES[table]) - {*words_of(table), *flags_of(table)}
        frame = load_table(tmp_path, "no run", table)
        assert all(frame[name].dtype.kind in "fi" for name in numbers) and list(frame.columns) == list(TABLES[table])


def test_a_folder_of_another_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "errors.csv").write_text("run_id,plan,error\n1,hf,0.1\n")
    with pytest.raises(UserError, match="errors.csv was written with other columns"):
        Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert (tmp_path / "errors.csv").read_text() == "run_id,plan,error\n1,hf,0.1\n"
    assert not (tmp_path / "environment.json").exists()


@pytest.mark.parametrize("folder", ["file/below", "held"])
def test_a_folder_that_cannot_be_used_is_named_in_one_line(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "held" / ".writable").mkdir(parents=True)
    with pytest.raises(UserError, match=f"results folder .*{folder} cannot be written .*choose another with --results"):
        Records(tmp_path / folder, SETTINGS, ENVIRONMENT)


def test_a_damaged_table_is_named_in_one_line(tmp_path: Path) -> None:
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    records.add(ErrorRow(**KEY))
    with open(tmp_path / "errors.csv", "a") as file:
        file.write(records.run_id + "," * 40 + "\n")
    with pytest.raises(UserError, match="errors.csv is damaged: ParserError: .* line 3, saw 41") as error:
        load_table(tmp_path, records.run_id, "errors")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["{", '{"runs": {}}', "[]", json.dumps({"schema": SCHEMA + 1, "runs": {}})])
def test_a_foreign_environment_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(UserError, match="choose another --results") as error:
        Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert "\n" not in str(error.value) and (tmp_path / "environment.json").read_text() == content


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Records(tmp_path / "file" / "results", SETTINGS, ENVIRONMENT)


def test_rows_join_a_run_that_is_there_finished_or_not(tmp_path: Path) -> None:
    """The run stays what it was: no new one, no other end."""
    first = Records(tmp_path, SETTINGS, ENVIRONMENT)
    first.add(ErrorRow(**KEY))
    first.finish()
    Records(tmp_path, SETTINGS, ENVIRONMENT)
    before = (tmp_path / "environment.json").read_bytes()
    again = Records.of_run(tmp_path, first.run_id)
    assert again.has(ErrorRow, **KEY)
    again.add(ErrorRow(**KEY), ErrorRow(**KEY | {"plan": "fp32"}))
    assert [(row["run_id"], row["plan"]) for row in rows(tmp_path)] == [(first.run_id, "hf"), (first.run_id, "fp32")]
    assert (tmp_path / "environment.json").read_bytes() == before
    with pytest.raises(KeyError, match="nothing"):
        Records.of_run(tmp_path, "nothing")
