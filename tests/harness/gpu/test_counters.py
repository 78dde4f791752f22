"""Nsight Compute's counters: what its table becomes, each way to fail, and what the counted process launches."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support import ROOT

from castpoint.harness.gpu import counters
from castpoint.harness.gpu.counters import CYCLES, ISSUED, L2_BYTES, LAUNCHES, METRICS, NotCounted, count, read_table
from castpoint.harness.runs.records import Records

FUSED, SPLIT = (launch.function for launch in LAUNCHES)
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
VALUES = {  # invented; of the first kernel and of the second
    L2_BYTES: ("byte", "2,147,483,648", "8650752"),
    CYCLES: ("cycle", "67,108,864", "1081344"),
    "sm__cycles_elapsed.max": ("cycle", "508,404", "8,192"),
    ISSUED: ("%", "37.5", "81.25"),
    "smsp__inst_executed.sum": ("inst", "100,000,000", "3500000"),
    "gpu__time_duration.sum": ("ns", "290,432", "4,160"),
}
PYTHON = f"{sys.executable}\nimport json, os, subprocess, sys"
BEFORE = f"""==PROF== Connected to process 4242 (/usr/bin/python3.12)
==PROF== Profiling "{FUSED}" - 0: 0%....50%....100% - 3 passes
==PROF== Profiling "{SPLIT}" - 1: 0%....50%....100% - 3 passes
==PROF== Disconnected from process 4242
"""


def line(number: int, kernel: str, metric: str, unit: str, value: str) -> str:
    where = f'"{number}","4242","python3.12","127.0.0.1","{kernel}","1","7","(256, 1, 1)","(32, 48, 1)","0","9.0"'
    return f'{where},"Command line profiler metrics","{metric}","{unit}","{value}"'


def table(**changed: str) -> str:
    """What ncu prints; changed: what stands in place of a value of the first kernel, by the metric's first word."""
    lines = [HEADER]
    for number, kernel in enumerate((FUSED, SPLIT)):
        for metric, (unit, *values) in VALUES.items():
            value = changed.get(metric.split(".")[0], values[0]) if number == 0 else values[1]
            lines.append(line(number, kernel, metric, unit, value))
    return BEFORE + "\n".join(lines) + "\n"


def ncu_that(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, program: str = PYTHON) -> None:
    """An ncu on PATH, before everything else there."""
    path = folder / "bin" / "ncu"
    path.parent.mkdir()
    path.write_text(f"#!{program}\n{code}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=os.pathsep)


def counted(folder: Path, **options: float) -> list[dict[str, str]]:
    records = Records(folder / "results", {"command": "gpu"}, {"commit": "test"})
    count(records, **options)
    return records.rows("gpu_counters")


def failure(folder: Path, **options: float) -> str:
    """The reason of the one row that there is."""
    (row,) = counted(folder, **options)
    assert (row["kernel"], row["counter"], row["status"], row["value"]) == ("all", "all", "failed", "")
    return row["reason"]


# ---------------------------------------------------------------- what it says


def test_rows_are_what_ncu_counted_and_what_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ncu_that(f"print({table()!r}, end='')", tmp_path, monkeypatch)
    found = counted(tmp_path)
    first, second = (str(launch) for launch in LAUNCHES)
    assert first == "qwen3-8b, 4096 tokens, one-rounding: fused after hidden 128 x 64, 8 warps, 4 stages"
    assert second.startswith("qwen3-0.6b, 1 token, deferred: split-k 16 x 128")
    assert {row["status"] for row in found} == {"ok"} and len(found) == 2 * (len(METRICS) + 2)
    said = {(row["kernel"], row["counter"]): (float(row["value"]), row["unit"]) for row in found}
    assert said[first, "bytes_per_clock_and_sm"] == (32.0, "byte/cycle")  # 2^31 / 2^26
    assert said[second, "bytes_per_clock_and_sm"] == (8.0, "byte/cycle")
    assert said[first, "issue_share"] == (0.375, "share") and said[second, "issue_share"] == (0.8125, "share")
    assert said[first, "gpu__time_duration.sum"] == (290432.0, "ns")
    assert said[second, L2_BYTES] == (8650750.0, "byte")  # as a table writes it, to six digits
    assert said[first, ISSUED] == (37.5, "%")


def test_thousands_may_be_set_apart_and_other_lines_stand_between() -> None:
    plain = read_table(table().replace("2,147,483,648", "2147483648"))
    noisy = table().replace(HEADER, f"a word of the program\n\n{HEADER}") + "==WARNING== a word of ncu\n"
    assert plain == read_table(table()) == read_table(noisy)
    assert plain[FUSED, L2_BYTES] == 2**31 and plain[SPLIT, ISSUED] == 81.25


def test_older_versions_have_more_columns_signatures_and_longer_units() -> None:
    older = table().replace(f'"{FUSED}"', f'"{FUSED}(unsigned short *, int)"').replace('"ns"', '"nsecond"')
    older = older.replace('"Metric Value"', '"Metric Value","Rule Name"').replace('4,160"', '4,160",""')
    assert read_table(older) == read_table(table())


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        (table().replace('"Metric Unit",', ""), "ncu printed no table with the columns Kernel Name, Metric Name, Metr"),
        (table().replace('"byte"', '"Mbyte"'), f"ncu gives {L2_BYTES} in 'Mbyte', not 'byte'"),
        (table().replace('"ns"', '"us"'), "ncu gives gpu__time_duration.sum in 'us', not 'ns'"),
        (table(l1tex__m_xbar2l1tex_read_bytes="n/a"), f"ncu gives 'n/a' for {L2_BYTES} of {FUSED}"),
        (table(l1tex__m_xbar2l1tex_read_bytes="2.147.483"), f"ncu gives '2.147.483' for {L2_BYTES} of {FUSED}"),
        (table(l1tex__m_xbar2l1tex_read_bytes="12,34"), f"ncu gives '12,34' for {L2_BYTES} of {FUSED}"),
        (table(sm__cycles_elapsed="0"), f"ncu gives '0' for {CYCLES} of {FUSED}"),
        (table().replace(SPLIT, FUSED), f"ncu counted two launches of {FUSED}"),
        (table().replace(SPLIT, "another"), f"ncu says nothing of {L2_BYTES} of {SPLIT}"),
        (table().replace(CYCLES, "sm__other.sum"), f"ncu says nothing of {CYCLES} of {FUSED}"),
        (table().rpartition('"1","4242"')[0], f"ncu says nothing of gpu__time_duration.sum of {SPLIT}"),
        (table()[: -len(',160"') - 1], "Error: unexpected end of data"),
    ],
)
def test_another_table_is_one_row_that_failed(tmp_path: Path, monkeypatch, printed: str, reason: str) -> None:
    monkeypatch.setattr(counters, "profiled", lambda limit_s: printed)
    assert failure(tmp_path).startswith(reason)


# ---------------------------------------------------------------- how it fails

DENIED = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"
UNLOADED = "==ERROR== Failed to initialize the profiler: LibraryNotLoaded"


@pytest.mark.parametrize(
    ("printed", "errors", "status", "reason"),
    [
        (f"==PROF== Connected to process 1\n{DENIED}\n==WARNING== No kernels were profiled.", "", 1, DENIED),
        (f"{DENIED}\n", "", 0, DENIED),
        (UNLOADED, "a warning\n", 1, f"{UNLOADED}; a warning"),
        ("", f"{UNLOADED}\n", 255, UNLOADED),
        ("==PROF== x\n==WARNING== No kernels were profiled.\n", "", 0, "==WARNING== No kernels were profiled."),
        ("==ERROR== Failed to find metric regex:^sm__x", "", 1, "==ERROR== Failed to find metric regex:^sm__x"),
        (table(), "Segmentation fault\n", 139, "Segmentation fault"),
        ("", "", 1, "it says nothing"),
    ],
)
def test_a_failure_is_one_row_in_ncus_own_words(
    tmp_path: Path, monkeypatch, printed: str, errors: str, status: int, reason: str
) -> None:
    code = f"sys.stdout.write({printed!r}); sys.stderr.write({errors!r}); sys.exit({status})"
    ncu_that(code, tmp_path, monkeypatch)
    assert failure(tmp_path) == f"ncu ended with status {status}: {reason}"


def test_a_program_that_is_no_program_is_one_row(tmp_path: Path, monkeypatch) -> None:
    ncu_that("", tmp_path, monkeypatch)
    (tmp_path / "bin" / "ncu").write_bytes(b"\x7fELF of another machine")
    assert failure(tmp_path).startswith("OSError: [Errno 8] Exec format error")


def test_bytes_that_are_no_text_are_one_row(tmp_path: Path, monkeypatch) -> None:
    ncu_that(r"sys.stdout.buffer.write(b'\xff\x00\n'); sys.exit(3)", tmp_path, monkeypatch)
    assert failure(tmp_path) == "ncu ended with status 3: it says nothing"


def test_when_its_time_is_over_it_ends_with_all_that_it_started(tmp_path: Path, monkeypatch) -> None:
    pid = tmp_path / "pid"
    ncu_that(f"sleep 60 & echo $! > {pid}\nsleep 60", tmp_path, monkeypatch, program="/bin/sh")
    before = time.monotonic()
    assert failure(tmp_path, limit_s=2) == "ncu took more than 2 s" and time.monotonic() - before < 30
    state = Path(f"/proc/{pid.read_text().strip()}/stat")
    for _ in range(100):  # it was told to end, and does soon; whoever adopted it may not have asked how
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the process that was counted goes on")


# ---------------------------------------------------------------- how it is called


def test_ncu_is_found_on_path_or_where_it_is_installed(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counters, "INSTALLED", tmp_path)
    assert failure(tmp_path) == f"ncu is neither on PATH nor in {tmp_path}"
    for version in ("2024.1.1", "2025.3.1", "2025.1.0"):
        (tmp_path / version).mkdir()
        (tmp_path / version / "ncu").touch()
    assert counters.nsight_compute() == str(tmp_path / "2025.3.1" / "ncu")
    ncu_that("", tmp_path, monkeypatch)
    assert counters.nsight_compute() == str(tmp_path / "bin" / "ncu")


def test_clocks_are_left_alone_units_are_plain_and_kernels_compiled(tmp_path: Path, monkeypatch) -> None:
    noted = tmp_path / "noted"
    code = f"json.dump([sys.argv, dict(os.environ), os.getcwd()], open({str(noted)!r}, 'w')); print({table()!r})"
    ncu_that(code, tmp_path, monkeypatch)
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert len(counted(tmp_path)) > 1
    arguments, environment, folder = json.loads(noted.read_text())
    given = dict(zip(arguments, arguments[1:], strict=False))
    assert given["--clock-control"] == "none" and given["--cache-control"] == "all"
    assert given["--print-units"] == "base" and given["--print-metric-name"] == "name"
    assert [word for word in arguments if word.startswith("--") and "clock" in word] == ["--clock-control"]
    assert (environment["TRITON_INTERPRET"], environment["LC_ALL"], Path(folder)) == ("0", "C", ROOT)
    assert arguments[-3:] == [sys.executable, "-m", "castpoint.harness.gpu.counters"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="what the process does on a GPU is not this test's to say")
def test_the_process_starts_from_a_bare_copy_and_its_own_error_is_said(tmp_path: Path, monkeypatch) -> None:
    """No GPU is here: it gets as far as to ask for one."""
    code = "done = subprocess.run(sys.argv[sys.argv.index('--launch-count') + 2:])\n"
    code += "print('==ERROR== The application returned an error code (%d).' % done.returncode); sys.exit(1)"
    ncu_that(code, tmp_path, monkeypatch)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    reason = failure(tmp_path)
    assert reason.startswith("ncu ended with status 1: ==ERROR== The application returned an error code (1).; ")
    assert re.search(r"(AssertionError|RuntimeError): .*(CUDA|NVIDIA)", reason), reason


# Compiles what the process launches, for a GPU that is not here, and notes each launch instead of running it.
LAUNCH = """
import json
from castpoint.harness.gpu import counters
from castpoint.harness.ptx import driver

launched = []

def launcher(source, metadata):
    def note(*values):
        launched.append([metadata.name, values[:3], metadata.num_warps, metadata.num_stages, metadata.target.arch])
    return note

driver._Driver.launcher_cls = staticmethod(launcher)
with driver.executed("sm_90"):
    counters.launch_all("cpu")
print(json.dumps([counters.ncu_command(), launched]))
"""


def test_the_launches_compile_for_sm_90_and_ncu_counts_the_last_of_each(tmp_path: Path, monkeypatch) -> None:
    ncu_that("", tmp_path, monkeypatch)
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", LAUNCH]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    arguments, launched = json.loads(done.stdout)
    given = dict(zip(arguments, arguments[1:], strict=False))
    let_through = re.compile(given["--kernel-name"].removeprefix("regex:"))
    matching = [launch for launch in launched if let_through.search(launch[0])]
    skipped, wanted = int(given["--launch-skip"]), int(given["--launch-count"])
    heads, splits = (32 + 2 * 8, 16 + 2 * 8), LAUNCHES[1].config.splits
    fused, split = [FUSED, [4096 // 128, heads[0], 1], 8, 4, 90], [SPLIT, [1, heads[1], splits], 8, 4, 90]
    assert matching[skipped : skipped + wanted] == [fused, split] == matching[-2:]
    assert all(matching[:skipped].count(launch) >= 2 for launch in (fused, split))  # both were warm
    assert {launch[0] for launch in launched} - {FUSED, SPLIT} == {"rms_norm_kernel"}  # the pre-pass, not counted


def test_not_counted_is_no_other_error() -> None:
    with pytest.raises(NotCounted, match="no table"):
        read_table("")
