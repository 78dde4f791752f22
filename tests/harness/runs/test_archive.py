"""A results folder as one file: whole at any moment, unpacked where there is nothing yet, and nowhere else."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from support import ROOT

from castpoint.harness.runs import archive as module
from castpoint.harness.runs.archive import unpack, write
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.frames import load_table
from castpoint.harness.runs.records import ARCHIVE_EVERY_S, Records, load_runs
from castpoint.harness.runs.schema import GpuLimitRow

SETTINGS, ENVIRONMENT = {"command": "gpu"}, {"device": "cpu", "sources": "abc"}


def limit(number: int) -> GpuLimitRow:
    return GpuLimitRow(limit=f"limit {number}", value=float(number), unit="s")


def rows_in(folder: Path) -> list[str]:
    (run_id,) = load_runs(folder)
    return list(load_table(folder, run_id, "gpu_limits")["limit"])


def rows_of(archive: Path, where: Path) -> list[str]:
    unpack(archive, where)
    return rows_in(where)


# ---------------------------------------------------------------- a file that says what the folder says


def test_an_archive_holds_the_folder(tmp_path: Path) -> None:
    folder, archive = tmp_path / "r", tmp_path / "r.tar.gz"
    records = Records(folder, SETTINGS, ENVIRONMENT)
    records.add(limit(1))
    (folder / "plots").mkdir()
    (folder / "plots" / "a.png").write_bytes(b"png")
    (folder / "draft.tmp").touch()
    write(folder, archive)
    unpack(archive, tmp_path / "again")
    found = {p.relative_to(tmp_path / "again").as_posix() for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert found == {"environment.json", "gpu_limits.csv", "plots/a.png"}
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in found)
    write(folder, folder / "inside.tar.gz")
    write(folder, folder / "inside.tar.gz")
    with tarfile.open(folder / "inside.tar.gz") as tar:
        assert set(tar.getnames()) == found, "an archive inside its folder does not hold itself"
    assert not list(tmp_path.rglob(".unpacked*")) and not list(tmp_path.rglob("*.gz.tmp"))


def test_it_is_written_again_once_the_last_one_is_old(tmp_path: Path) -> None:
    now, archive = [100.0], tmp_path / "r.tar.gz"
    records = Records(tmp_path / "r", SETTINGS, ENVIRONMENT, archive, clock=lambda: now[0])
    held = [rows_of(archive, tmp_path / "start")]
    for number, step in enumerate((1.0, ARCHIVE_EVERY_S - 2, 1.0, 1.0)):  # 1, 14, 15 and 16 s behind the first
        now[0] += step
        records.add(limit(number))
        held.append(rows_of(archive, tmp_path / f"after {number}"))
    assert list(map(len, held)) == [0, 0, 0, 3, 3]
    records.close()
    assert len(rows_of(archive, tmp_path / "closed")) == 4
    records.add(limit(9))
    records.finish()
    assert len(rows_of(archive, tmp_path / "finished")) == 5
    assert "finished" in load_runs(tmp_path / "finished")[records.run_id]


def test_without_an_archive_none_is_written(tmp_path: Path) -> None:
    records = Records(tmp_path / "r", SETTINGS, ENVIRONMENT)
    records.finish()
    records.close()
    assert [path.name for path in tmp_path.iterdir()] == ["r"]


def test_the_archive_stays_whole_while_the_next_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where its writing ends halfway."""
    folder, archive = tmp_path / "r", tmp_path / "r.tar.gz"
    records = Records(folder, SETTINGS, ENVIRONMENT, archive)
    records.add(limit(1))
    records.close()
    real = tarfile.TarFile.add

    def stops(self: tarfile.TarFile, path: Path, name: str) -> None:
        if name == "gpu_limits.csv":
            raise KeyboardInterrupt
        real(self, path, name)

    monkeypatch.setattr(tarfile.TarFile, "add", stops)
    records.add(limit(2))
    with pytest.raises(KeyboardInterrupt):
        records.close()
    assert rows_of(archive, tmp_path / "again") == ["limit 1"]


# ---------------------------------------------------------------- killed

ADDING = """
import sys
from pathlib import Path
from castpoint.harness.runs import records as module
from castpoint.harness.runs.schema import GpuLimitRow
module.ARCHIVE_EVERY_S = 0.001
folder = Path(sys.argv[1])
records = module.Records(folder, {"command": "gpu"}, {"device": "cpu", "sources": "abc"}, folder.with_suffix(".tar.gz"))
for number in range(1000000):
    records.add(GpuLimitRow(limit=f"limit {number}", value=float(number), unit="s"))
    print(number, flush=True)
"""


def test_a_killed_process_loses_at_most_the_row_in_flight(tmp_path: Path) -> None:
    """kill -9 at moments of no choice of ours. The run goes on in its folder, and from its archive elsewhere."""
    folder, archive = tmp_path / "run", tmp_path / "run.tar.gz"
    reached = 0
    for turn in range(4):
        said = tmp_path / f"said {turn}"
        with open(said, "w") as out:
            process = subprocess.Popen([sys.executable, "-c", ADDING, str(folder)], cwd=ROOT, stdout=out)
            deadline = time.monotonic() + 60
            while said.read_text().count("\n") < reached + 200 and time.monotonic() < deadline:
                time.sleep(0.001 * turn)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        reached = said.read_text().count("\n")
        held = rows_in(folder)
        assert held == [f"limit {number}" for number in range(len(held))], "every row once, in order"
        assert len(held) in (reached, reached + 1) and reached >= 200 * (turn + 1)
        copied = rows_of(archive, tmp_path / f"copy {turn}")
        assert copied == held[: len(copied)] and len(copied) > 0
    (run_id,) = load_runs(folder)
    second = Records(tmp_path / "second", SETTINGS, ENVIRONMENT, archive)
    assert second.run_id == run_id and second.has(GpuLimitRow, limit="limit 0")
    assert len(second.rows("gpu_limits")) == len(copied)


# ---------------------------------------------------------------- where it is unpacked


def test_a_folder_with_records_is_never_unpacked_into(tmp_path: Path) -> None:
    folder, archive = tmp_path / "r", tmp_path / "r.tar.gz"
    Records(folder, SETTINGS, ENVIRONMENT, archive).add(limit(1))
    with pytest.raises(UserError, match="r holds records already"):
        unpack(archive, folder)
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "gpu_limits.csv").write_text("mine\n")
    with pytest.raises(UserError, match="tables holds records already"):
        unpack(archive, tmp_path / "tables")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    unpack(archive, tmp_path / "notes")
    assert (tmp_path / "notes" / "mine.txt").exists() and (tmp_path / "notes" / "environment.json").exists()


def test_an_archive_that_holds_more_than_the_folder_is_not_written_over(tmp_path: Path) -> None:
    """A second machine's rows, brought home beside an older copy of the folder."""
    archive = tmp_path / "r.tar.gz"
    far = Records(tmp_path / "far", SETTINGS, ENVIRONMENT, archive)
    home = Records(tmp_path / "home", SETTINGS, ENVIRONMENT, archive)
    assert home.run_id == far.run_id
    far.add(limit(1))
    far.close()
    before = archive.read_bytes()
    with pytest.raises(UserError, match=r"r.tar.gz holds more rows than .*home \(gpu_limits.csv\)") as error:
        Records(tmp_path / "home", SETTINGS, ENVIRONMENT, archive)
    assert archive.read_bytes() == before and "\n" not in str(error.value)
    assert Records(tmp_path / "far", SETTINGS, ENVIRONMENT, archive).run_id == far.run_id


def test_a_folder_half_unpacked_holds_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """environment.json comes last: rows without it are nobody's, and the archive stays as it is."""
    folder, archive = tmp_path / "r", tmp_path / "r.tar.gz"
    records = Records(folder, SETTINGS, ENVIRONMENT, archive)
    records.add(limit(1))
    records.close()
    real = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: 1 / 0 if path.name == module.ENVIRONMENT else real(path, to))
    with pytest.raises(ZeroDivisionError):
        unpack(archive, tmp_path / "half")
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["gpu_limits.csv"]


def packed(archive: Path, *members: tuple[str, bytes | str]) -> Path:
    """An archive of those names and contents; a word is where a link leads."""
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return archive


@pytest.mark.parametrize(
    "fault", ["no file", "a folder", "no archive", "half", "damaged", "other", "outside", "a link"]
)
def test_what_is_no_archive_of_ours_is_one_line(tmp_path: Path, fault: str) -> None:
    folder, archive = tmp_path / "made", tmp_path / "bad.tar.gz"
    records = Records(tmp_path / "r", SETTINGS, ENVIRONMENT)
    for number in range(200):
        records.add(limit(number))
    write(tmp_path / "r", archive)
    whole = archive.read_bytes()
    environment = ("environment.json", b"{}")
    if fault in ("no file", "a folder"):
        archive.unlink()
    if fault == "a folder":
        archive.mkdir()
    elif fault == "no archive":
        archive.write_text("run_id,limit\n")
    elif fault == "half":
        archive.write_bytes(whole[: len(whole) // 2])
    elif fault == "damaged":
        archive.write_bytes(whole[:900] + bytes(len(whole) - 900))
    elif fault == "other":
        packed(archive, ("notes.txt", b"mine"))
    elif fault == "outside":
        packed(archive, environment, ("../escaped.csv", b"mine"))
    elif fault == "a link":
        packed(archive, environment, ("errors.csv", "/etc/hostname"))
    with pytest.raises(UserError, match="bad.tar.gz is no archive of a results folder") as error:
        unpack(archive, folder)
    assert "\n" not in str(error.value) and not (tmp_path / "escaped.csv").exists()
    assert not list(folder.iterdir()) and not list(tmp_path.rglob(".unpacked*"))
    if archive.exists():
        with pytest.raises(UserError, match="is no archive"):
            Records(tmp_path / "new", SETTINGS, ENVIRONMENT, archive)
