"""Kernels and variants import nothing above them, and the kernels' folder runs wherever it is copied."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import KERNELS, ROOT, assert_inside, pinned_share

from castpoint.harness.problems.drawn import synthetic_problem
from castpoint.variants.catalogue import PLANS
from castpoint.variants.envelope import envelope


def imported(folder: str, root: Path = ROOT) -> set[str]:
    """Top-level names of everything the modules of a package import, wherever in a file; of castpoint's own packages
    the name below it. A relative import that leaves the package counts by the name behind its dots."""
    names = set()
    for path in (root / folder).rglob("*.py"):
        depth = len(path.relative_to(root).parts) - 1  # of the packages around the module: so many dots stay inside
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.module):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found = [node.module]
            else:
                continue
            inside = isinstance(node, ast.ImportFrom) and 0 < node.level <= depth
            names |= {folder} if inside else {name.removeprefix("castpoint.").split(".")[0] for name in found}
    return names - set(sys.stdlib_module_names)


def test_the_folder_needs_torch_and_triton_alone():
    assert imported("kernels") == {"kernels", "torch", "triton"}


@pytest.mark.parametrize(
    "line",
    [
        "import castpoint.harness.problems.grid",
        "from harness import grid",
        "from ..harness import grid",
        "from ..harness.grid import points",
        "from .. import harness",
        "def late():\n    from ...harness import grid",
    ],
)
def test_an_arrow_that_points_up_is_seen(line: str, tmp_path: Path):
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    assert imported("kernels", tmp_path) == imported("kernels")
    with open(tmp_path / "kernels" / "chain.py", "a") as file:
        file.write(f"\n{line}\n")
    assert imported("kernels", tmp_path) - imported("kernels") in ({"harness"}, {"castpoint"})


IN_AN_ENGINE = """
import importlib
import pkgutil
import sys
import torch
import my_engine.kernels as package
from my_engine.kernels.norm_qkv import norm_qkv

for module in pkgutil.iter_modules(package.__path__):
    importlib.import_module(f"my_engine.kernels.{module.name}")

def ones(*shape):
    return torch.ones(shape, dtype=torch.bfloat16)

q, k, v = norm_qkv(ones(2, 32), ones(32), ones(64, 32), 2, 1, q_norm_weight=ones(16), k_norm_weight=3 * ones(16))
assert q.shape == (2, 2, 16) and k.shape == v.shape == (2, 1, 16)
print(q.unique().tolist(), k.unique().tolist(), v.unique().tolist())
print(*sorted({name.split(".")[0] for name in sys.modules} & {"castpoint", "kernels", "harness", "my_engine"}))
"""


def test_the_folder_runs_inside_an_engine(tmp_path: Path):
    """Copied as the README says, with none of this repository on the path."""
    shutil.copytree(ROOT / "kernels", tmp_path / "my_engine" / "kernels")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", IN_AN_ENGINE]
    done = subprocess.run(
        command, cwd=tmp_path, env={**environment, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[1.0] [3.0] [32.0]", "my_engine"]


@pytest.mark.parametrize("name", ["hf", "bf16-statistics"])
def test_massive_activations(name: str) -> None:
    """From layer 2 on one value of the first token is 1800 times the others' rms, four channels are large in all."""
    plan = PLANS[name].plan
    problem = synthetic_problem("qwen3-0.6b", layer=8, tokens=8)
    assert problem.x[0].abs().max() > 1000 * problem.x[1:].float().square().mean().sqrt()
    allowed = envelope(plan, problem)
    assert min(pinned_share(ends) for ends in allowed.values()) > 0.8, "the envelope says little here"
    actual = KERNELS.run(plan, problem)
    assert_inside(actual=actual, allowed=allowed)
    with pytest.raises(AssertionError, match="outside the envelope"):
        assert_inside(actual=actual, allowed=envelope(plan.replace(out="bf16-rtz"), problem))


@pytest.mark.parametrize("folder", ["kernels", "variants"])
def test_the_readmes_lines_of_python_run(folder: str):
    code = (ROOT / folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {}
    exec(code.replace('"cuda"', '"cpu"'), names)
    assert all(names[value].isfinite().all() for value in "qkv")
