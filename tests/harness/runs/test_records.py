"""Records: appended and flushed, continued after a stop, and never mixed with another schema."""

import csv
import json
from pathlib import Path

import pytest

from castpoint.harness.runs.records import KEYS, SCHEMA, TABLES, Records, load_runs

SETTINGS, ENVIRONMENT = {"model": "m"}, {"device": "cpu"}
KEY = {"weights": "w", "layer": 0, "tokens": 4, "plan": "hf", "backend": "spec", "output": "k", "reference": "truth"}


def rows(folder: Path, table: str = "errors") -> list[dict[str, str]]:
    with open(folder / f"{table}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_columns_are_those_that_tools_rely_on() -> None:
    assert ",".join(TABLES["errors"]) == (
        "run_id,model,weights,layer,tokens,seed,plan,backend,output,reference,max_abs,mean_abs,rms,rel_rms,max_ulp,"
        "p99_ulp,mean_ulp,share_equal,signed_mean,at_token,at_head,at_channel,status,reason"
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
    records.add("errors", **KEY, max_abs=0.125, reason="two\nlines")
    (row,) = rows(tmp_path)
    assert row["run_id"] == records.run_id and row["max_abs"] == "0.125" and row["status"] == "ok"
    assert row["reason"] == "two lines" and row["rms"] == ""
    assert records.has("errors", **KEY) and not records.has("errors", **{**KEY, "plan": "fp32"})


def test_a_stopped_run_is_continued_and_a_finished_one_is_not(tmp_path: Path) -> None:
    first = Records(tmp_path, SETTINGS, ENVIRONMENT)
    first.add("errors", **KEY)
    again = Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert again.run_id == first.run_id and again.has("errors", **KEY)
    again.finish()
    fresh = Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert fresh.run_id != first.run_id and not fresh.has("errors", **KEY)
    fresh.add("errors", **KEY)
    assert len(rows(tmp_path)) == 2 and len(fresh.rows("errors")) == 1
    assert list(load_runs(tmp_path)) == [first.run_id, fresh.run_id]


@pytest.mark.parametrize("changed", [({"model": "n"}, ENVIRONMENT), (SETTINGS, {"device": "cuda"})])
def test_other_settings_or_another_machine_start_another_run(tmp_path: Path, changed: tuple) -> None:
    first = Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert Records(tmp_path, *changed).run_id != first.run_id


def test_half_a_row_left_by_a_killed_run_is_dropped_and_nothing_else(tmp_path: Path) -> None:
    records = Records(tmp_path, SETTINGS, ENVIRONMENT)
    records.add("errors", **KEY)
    with open(tmp_path / "errors.csv", "a") as file:
        file.write(f"{records.run_id},qwen3-0.6b,calibr")
    again = Records(tmp_path, SETTINGS, ENVIRONMENT)
    again.add("errors", **{**KEY, "plan": "fp32"})
    assert [row["plan"] for row in rows(tmp_path)] == ["hf", "fp32"]


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no column speed"):
        Records(tmp_path, SETTINGS, ENVIRONMENT).add("errors", **KEY, speed=1)


def test_a_folder_of_another_schema_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "errors.csv").write_text("run_id,plan,error\n1,hf,0.1\n")
    with pytest.raises(ValueError, match="errors.csv was written with other columns"):
        Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert (tmp_path / "errors.csv").read_text() == "run_id,plan,error\n1,hf,0.1\n"
    assert not (tmp_path / "environment.json").exists()


@pytest.mark.parametrize("content", ["{", '{"runs": {}}', "[]", json.dumps({"schema": SCHEMA + 1, "runs": {}})])
def test_a_foreign_environment_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(ValueError, match="choose another --results") as error:
        Records(tmp_path, SETTINGS, ENVIRONMENT)
    assert "\n" not in str(error.value) and (tmp_path / "environment.json").read_text() == content


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Records(tmp_path / "file" / "results", SETTINGS, ENVIRONMENT)
