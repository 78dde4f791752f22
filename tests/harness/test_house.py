"""The house: rooms, the import rule, sizes, what is installed. The import rule's contracts stand in pyproject.toml."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HARNESS = ROOT / "harness"
CODE = ("castpoint", "kernels", "variants", "harness")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

ROOMS = {  # room -> what it imports of the others
    "runs": (),
    "problems": ("runs",),
    "compiled": ("runs",),
    "accuracy": ("problems", "runs"),
    "timing": ("problems", "runs"),
    "ptx": ("compiled", "runs"),
    "audit": ("compiled", "runs"),
    "report": ("problems", "runs"),
    "cases": ("accuracy", "problems", "runs"),
    "model": ("accuracy", "problems", "runs"),
    "systems": ("accuracy", "model", "problems", "runs"),
    "peers": ("timing", "ptx", "runs"),
    "conformance": ("accuracy", "peers", "problems", "ptx", "runs", "timing"),
    "fingerprint": ("compiled", "peers", "problems", "ptx", "runs"),
    "gpu": ("conformance", "peers", "problems", "runs", "timing"),
}
PLANTED = {  # file of the laid-out package -> an import that the rule forbids, and its contract's name
    "kernels/rounding.py": ("from castpoint.variants import catalogue", "kernels know nothing of variants"),
    "variants/spec.py": ("import castpoint.harness.runs.errors", "kernels know nothing of variants"),
    "harness/runs/errors.py": ("from castpoint.harness.problems import grid", "a room imports what stands below it"),
    "harness/ptx/numbers.py": ("from castpoint.harness.timing import rig", "a room imports what stands below it"),
    "harness/model/passes.py": ("from castpoint.harness import options", "a room imports what stands below it"),
    "harness/report/style.py": ("import torch", "report tells from records"),
    "harness/report/markdown.py": ("from castpoint.harness.problems import drawn", "report tells from records"),
}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports, in functions too; of `from a import b` it is `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_imports_only_what_the_table_grants() -> None:
    rooms = {path.name for path in HARNESS.iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(ROOMS) and len(rooms) >= 12
    found = {
        (room, name.split(".")[2], str(path.relative_to(ROOT)))
        for room in ROOMS
        for path in sources(f"harness/{room}")
        for name in imported(path)
        if name.startswith("castpoint.harness.")
    }
    assert not [fault for fault in found if fault[1] != fault[0] and fault[1] not in ROOMS[fault[0]]]


def test_the_table_has_no_circle() -> None:
    known: set[str] = set()
    while ready := {room for room, below in ROOMS.items() if room not in known and known.issuperset(below)}:
        known |= ready
    assert known == set(ROOMS)


def test_few_files_stand_beside_the_rooms_and_none_is_long() -> None:
    assert len(list(HARNESS.glob("*.py"))) <= 5
    lengths = {path: len(path.read_text().splitlines()) for path in sources(*CODE, "tests")}
    assert not {str(path.relative_to(ROOT)): lines for path, lines in lengths.items() if lines > 350}


def test_kernels_import_relatively_so_that_an_engine_can_copy_the_folder() -> None:
    assert not [(path.name, name) for path in sources("kernels") for name in imported(path) if "castpoint" in name]


def test_every_folder_of_code_is_packed_under_castpoint() -> None:
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in sources(*CODE) if path.name == "__init__.py"}
    due = {name if name.startswith("castpoint") else f"castpoint.{name}" for name in packages}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == due


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four folders as one package, as `make lint` lays them out."""
    folder = tmp_path_factory.mktemp("lint") / "castpoint"
    shutil.copytree(ROOT / "castpoint", folder)
    for room in CODE[1:]:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def linted(laid_out: Path) -> subprocess.CompletedProcess[str]:
    run = "from importlinter.cli import lint_imports_command as run; run()"
    command = [sys.executable, "-c", run, "--no-cache", str(ROOT / "pyproject.toml")]
    return subprocess.run(command, cwd=laid_out.parent, capture_output=True, text=True, check=False)


def test_the_linter_accepts_the_tree_as_it_is(laid_out: Path) -> None:
    done = linted(laid_out)
    assert done.returncode == 0 and "0 broken" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("file", PLANTED)
def test_the_linter_goes_red_on_a_planted_import(laid_out: Path, file: str) -> None:
    line, contract = PLANTED[file]
    path = laid_out / file
    source = path.read_text()
    path.write_text(source + f"\n\ndef _planted() -> None:\n    {line}\n")
    try:
        done = linted(laid_out)
    finally:
        path.write_text(source)
    broken = done.stdout.partition("Broken contracts")[2]
    module = "castpoint." + file.removesuffix(".py").replace("/", ".")
    assert done.returncode == 1 and contract in broken and f"{module} ->" in broken, done.stdout + done.stderr


def loaded_by(statement: str) -> list[str]:
    """Which of the heavy packages a fresh Python has loaded behind that statement."""
    heavy = "import sys; print(*sorted({'torch', 'triton', 'transformers', 'jax', 'pandas'} & set(sys.modules)))"
    command = [sys.executable, "-c", f"{statement}; {heavy}"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


def test_the_package_loads_nothing_before_it_is_asked() -> None:
    assert loaded_by("import castpoint; castpoint.__version__; dir(castpoint)") == []


def test_every_module_of_the_report_starts_without_torch_and_triton() -> None:
    modules = ["castpoint.harness.report", *(f"castpoint.harness.report.{p.stem}" for p in sources("harness/report"))]
    names = ", ".join(name for name in modules if not name.endswith("__init__"))
    assert not {"torch", "triton"} & set(loaded_by(f"import {names}"))


def test_public_names_are_what_they_say() -> None:
    import castpoint
    from castpoint.kernels.norm_qkv import norm_qkv

    assert castpoint.norm_qkv is norm_qkv and castpoint.PLANS["hf"].plan == castpoint.plan_named("hf")
    assert isinstance(castpoint.plan_named("hf"), castpoint.CastPlan) and callable(castpoint.identify)
    assert castpoint.__version__ == PROJECT["project"]["version"]
    assert set(castpoint.__all__) <= set(dir(castpoint))
    with pytest.raises(AttributeError, match="has no attribute 'kernel'"):
        castpoint.kernel  # noqa: B018
