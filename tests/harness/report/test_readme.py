"""The READMEs: what they show is what the records say, what they tell to type runs, what they link to is there."""

from __future__ import annotations

import json
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from commands import ROOT, command

import castpoint.harness.__main__ as cli
from castpoint.harness import report
from castpoint.harness.report.findings import anchor
from castpoint.harness.report.page import newest_run
from castpoint.harness.report.publish import publish
from castpoint.harness.report.readme import BLOCK, SHOWN, readme_block, update_readme
from castpoint.harness.runs.errors import UserError
from castpoint.harness.runs.records import TABLES, load_runs

README = (ROOT / "README.md").read_text()
PAGES = [
    ROOT / "README.md",
    *sorted(p for f in ("kernels", "variants", "harness", "results") for p in (ROOT / f).rglob("README.md")),
]
PLAIN = re.sub(r"```.*?```|<!--.*?-->|\]\([^)]*\)", " ", README, flags=re.DOTALL)  # without code and addresses


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


# ---------------------------------------------------------------- the generated block


def test_the_readme_shows_the_records() -> None:
    """The block of the README is what the run it names gives, letter for letter."""
    match = BLOCK.search(README)
    assert match, "README.md has no generated block"
    folder, run_id = match.groups()
    assert match.group(0) == readme_block(ROOT / folder, run_id).replace(str(ROOT) + "/", "")
    assert "finished" in load_runs(ROOT / folder)[run_id]


def test_eight_plans_six_findings_each_with_its_section() -> None:
    block = BLOCK.search(README).group(0)
    assert len(re.findall(r"^\| (?!plan|---)", block, re.MULTILINE)) == len(SHOWN) == 8
    findings = re.findall(r"^- .*\[More\]\(results/cpu/report\.md#(\S+)\)$", block, re.MULTILINE)
    assert len(set(findings)) == 6
    headings = re.findall(r"^## (.*)$", (ROOT / "results/cpu/report.md").read_text(), re.MULTILINE)
    assert set(findings) <= {anchor(heading) for heading in headings}


def test_the_report_lists_its_sections() -> None:
    text = (ROOT / "results/cpu/report.md").read_text()
    listed = re.findall(r"^- \[(.*)\]\(#(\S+)\)$", text, re.MULTILINE)
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert listed == [(heading, anchor(heading)) for heading in headings] and len(headings) > 10


def test_a_newer_bench_does_not_change_what_the_readme_says_of_an_older_one(tmp_path: Path) -> None:
    folder, run_id = BLOCK.search(README).groups()
    copy = tmp_path / "cpu"
    shutil.copytree(ROOT / folder, copy, ignore=shutil.ignore_patterns("plots"))
    before = readme_block(copy, run_id)
    runs = json.loads((copy / "environment.json").read_text())
    runs["runs"]["29990101T000000"] = runs["runs"][run_id]
    (copy / "environment.json").write_text(json.dumps(runs))
    for table in ("errors", "amplification", "speed"):
        rows = [line.split(",") for line in (copy / f"{table}.csv").read_text().splitlines()[1:]]
        newer = [",".join(["29990101T000000", *(cell.replace("1", "3") for cell in row[1:])]) for row in rows]
        with open(copy / f"{table}.csv", "a") as file:
            file.write("\n".join(newer) + "\n")
    assert newest_run(copy) == "29990101T000000" and readme_block(copy, run_id) == before


def test_a_typed_number_in_the_readme_is_noticed(tmp_path: Path) -> None:
    folder, run_id = BLOCK.search(README).groups()
    error = re.search(r"\| (\d\.\d\d) \(", README)[1]
    changed = README.replace(f"| {error} (", f"| {float(error) + 0.01:.2f} (", 1)
    assert changed != README and BLOCK.search(changed).group(0) != readme_block(Path(folder), run_id)
    (tmp_path / "README.md").write_text(changed)
    update_readme(tmp_path / "README.md", ROOT / folder)
    assert f"| {error} (" in (tmp_path / "README.md").read_text()


def test_a_readme_without_markers_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("# nothing\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="whose README.md has the generated block"):
        publish(None)


def test_committed_records_are_whole() -> None:
    for folder in (path for path in (ROOT / "results").iterdir() if path.is_dir()):
        runs = load_runs(folder)
        assert runs and all({"settings", "environment"} <= set(run) for run in runs.values())
        assert json.loads((folder / "environment.json").read_text())["schema"] == 1
        for table, columns in TABLES.items():
            if not (folder / f"{table}.csv").exists():
                continue
            lines = (folder / f"{table}.csv").read_text().splitlines()
            assert lines[0] == ",".join(columns) and {line.split(",")[0] for line in lines[1:]} <= set(runs)


# ---------------------------------------------------------------- what a reader meets


def test_the_readme_is_short() -> None:
    numbers = re.findall(r"(?<![\w.\-])\d[\d,]*(?:\.\d+)*(?![\w\-])", PLAIN)
    assert len(README.splitlines()) <= 120 and len(README.split()) <= 1200
    assert len(numbers) <= 85, "eight plans and six findings have ranges"
    assert "µs" not in README and "seconds" not in README, "CPU times invert between CPUs"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)\s]*)\)", page.read_text()):
        path, _, fragment = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            assert fragment in {anchor(heading) for heading in headings}, target


def check_line(line: str) -> None:
    """Fails where the command line or the Makefile does not know a line; runs nothing."""
    name, *arguments = shlex.split(line, comments=True)
    if name == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in arguments if "=" not in word and word not in targets]
        assert not unknown, f"{line}: make knows no {unknown}"
        return
    if name == "export":
        assert all("=" in word for word in arguments if not word.endswith(">")), line
        return
    if (name, *arguments[:2]) == ("python3", "-m", "castpoint"):
        name, *arguments = arguments[1:]
    assert name == "castpoint", line
    found = typer.main.get_command(cli.app)
    while hasattr(found, "commands"):
        name, *arguments = arguments
        assert name in found.commands, f"{line}: no command {name}"
        found = found.commands[name]
    try:
        found.make_context(name, arguments)
    except Exception as error:  # of click, or of the click inside typer
        raise AssertionError(f"{line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    for block in blocks(page.read_text(), "sh"):
        for line in filter(None, block.splitlines()):
            check_line(line)


WRONG = ("castpoint nothing", "castpoint plans --fast", "python3 -m castpoint gpu --tune", "python3 -m nothing")


@pytest.mark.parametrize("line", [*WRONG, "make nothing", "export nothing", "rm -r results"])
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError):
        check_line(line)


def test_identify_says_what_the_readme_shows(tmp_path: Path) -> None:
    """The function, the command and its output stand in the README one after the other; of long lines and lists the
    beginning, then `...`."""
    section = README.split("## Which plan is my kernel?")[1].split("\n## ")[0]
    (function,), (line,), (output,) = (blocks(section, language) for language in ("python", "sh", "text"))
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "norms.py").write_text(function)
    words = shlex.split(line.replace("my/norms.py", str(tmp_path / "my" / "norms.py")))
    result = command(*words[1:])
    assert result.returncode == 0, result.stderr

    def untimed(text: str) -> str:
        return re.sub(r"[\d.]+ s$", "s", text.strip(), flags=re.MULTILINE)

    said = iter(untimed(result.stdout).splitlines())
    for shown in untimed(output).splitlines():
        start = shown.removesuffix("...")
        assert any(line == shown or (start != shown and line.startswith(start)) for line in said), shown


def test_the_kernels_are_used_as_the_readme_shows() -> None:
    section = README.split("## Use the kernels")[1].split("\n## ")[0]
    (lines,) = blocks(section, "python")

    def drawn(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes).bfloat16()

    given = {"x": drawn(2, 64), "norm_weight": drawn(64), "qkv_weight": drawn(4 * 32, 64), "num_q_heads": 2}
    given |= {"num_kv_heads": 1, "q_norm_weight": drawn(32), "k_norm_weight": drawn(32)}
    exec(lines, given)
    assert [tuple(given[name].shape) for name in "qkv"] == [(2, 2, 32), (2, 1, 32), (2, 1, 32)]


# ---------------------------------------------------------------- the import rule


def test_the_report_loads_neither_torch_nor_triton() -> None:
    modules = [f"castpoint.harness.report.{module.name}" for module in pkgutil.iter_modules(report.__path__)]
    script = (
        f"import importlib, sys\nfor module in {modules}:\n    importlib.import_module(module)\n"
        "    assert not {'torch', 'triton'} & set(sys.modules), module"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert len(modules) > 10 and result.returncode == 0, result.stderr
