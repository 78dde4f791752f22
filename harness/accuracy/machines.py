"""Eager on every instruction set that this CPU can play: what it changes against itself, and how far each plan's spec
is from it. Eager's matmul is oneDNN's, and oneDNN adds in another order on another one.

ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY are read as torch is loaded, so each set is a process of its own: `python -m
castpoint.harness.accuracy.machines FILE`, with settings and problems as JSON on standard input. FILE, in safetensors,
gets eager's K of every problem and a digest of its inputs, and what eager changes against itself.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.problems.drawn import digest, problem_at
from castpoint.harness.runs.environment import ISAS, matmul_arithmetic
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records, Settings
from castpoint.harness.runs.schema import EagerRow
from castpoint.harness.runs.words import Backend, Status
from castpoint.variants.eager import eager, eager_plan
from castpoint.variants.problem import Problem

PLAYED = {
    "avx2": "avx2",
    "avx512_core": "avx512",
    "avx512_core_bf16": "avx512",
    "avx512_core_amx": "avx512",
}
THREADS = (1, 2, 4)
WORDS = ("inputs", "keys", "rows")  # of Played, beside its K
KEPT = ("share_equal", "rel_rms", "max_ulp", "max_abs")  # of an error's columns


@dataclass(frozen=True)
class Played:
    """What one instruction set gave: oneDNN's name of its matmul; by name of every problem eager's K [T, Hkv, Dh] bf16,
    a digest of its inputs and what a row says of it; columns of rows of eager against itself."""

    kernel: str
    k: dict[str, Tensor]
    inputs: dict[str, str]
    keys: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]


class Machines:
    """Eager on the instruction sets of this CPU, on the problems of these layers and plans (one a way of storing norm
    weights). Nothing is run before it is asked for; rows of eager against itself are recorded then."""

    def __init__(self, settings: Settings, records: Records, problems: list[tuple[int, str]]) -> None:
        self.settings, self.records, self.problems = settings, records, problems

    def compared(self, problem: Problem, plan: str, k: Tensor) -> Iterator[EagerRow]:
        """Rows of K [T, Hkv, Dh] of a plan's spec against eager on each instruction set."""
        for isa, played in self.played.items():
            if (found := played.k.get(_name(problem))) is not None:
                row = _key(self.settings, problem, plan) | {"backend": Backend.SPEC, "isa": isa}
                yield EagerRow(**row, kernel=played.kernel, **_errors(k, found.to(k.device)))

    @cached_property
    def played(self) -> dict[str, Played]:
        """By instruction set; without those that this CPU does not have, or that failed: those are rows."""
        own, found = _own(self.settings.device), {}
        for isa in track([own, *_below(own)], "eager by instructions"):
            try:
                played = _play(self.settings, self.problems, _limits(isa, own))
            except RuntimeError as error:
                self._missing(isa, Status.FAILED, str(error))
                continue
            if same := [name for name, other in found.items() if other.kernel == played.kernel]:
                self._missing(isa, Status.NOT_APPLICABLE, f"{played.kernel} multiplies, as under {same[0]}")
            elif differ := [name for other in found.values() for name in _drawn_otherwise(played, other)]:
                self._missing(isa, Status.FAILED, f"other inputs were drawn: {', '.join(differ[:3])}")
            else:
                found[isa] = played
        for isa in PLAYED if own in PLAYED else ():
            if ISAS.index(isa) > ISAS.index(own):
                self._missing(isa, Status.NOT_APPLICABLE, f"this CPU has {own} at most")
        for isa, played in found.items():
            self.records.add(*(EagerRow(**row, isa=isa, kernel=played.kernel) for row in played.rows))
        for one, other in itertools.combinations(found, 2):
            self._between(one, other, found)
        return found

    def _between(self, one: str, other: str, found: dict[str, Played]) -> None:
        """Rows of eager on one instruction set against eager on another."""
        for name, key in found[one].keys.items():
            errors = _errors(found[other].k[name], found[one].k[name])
            self.records.add(EagerRow(**key, isa=one, kernel=found[one].kernel, backend=f"eager, {other}", **errors))

    def _missing(self, isa: str, status: Status, reason: str) -> None:
        s, (layer, plan) = self.settings, self.problems[0]
        key = {"model": s.model, "weights": "", "layer": layer, "tokens": s.tokens, "seed": s.seed, "plan": plan}
        self.records.add(EagerRow(**key, isa=isa, backend=Backend.EAGER, status=status, reason=reason))


def _drawn_otherwise(one: Played, other: Played) -> list[str]:
    return [name for name in one.inputs if one.inputs[name] != other.inputs[name]]


def _own(device: str) -> str:
    """The instruction set of this machine as it is."""
    return matmul_arithmetic()["onednn_isa"] if device == "cpu" else device


def _below(own: str) -> list[str]:
    """Those that a CPU with that one can play."""
    return [isa for isa in PLAYED if own in ISAS and ISAS.index(isa) < ISAS.index(own)]


def _limits(isa: str, own: str) -> dict[str, str]:
    return {} if isa == own else {"ONEDNN_MAX_CPU_ISA": isa.upper(), "ATEN_CPU_CAPABILITY": PLAYED[isa]}


def _play(settings: Settings, problems: list[tuple[int, str]], limits: dict[str, str]) -> Played:
    """Raises RuntimeError if the process fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "eager.safetensors"
        done = subprocess.run(
            [sys.executable, "-m", "castpoint.harness.accuracy.machines", str(path)],
            input=json.dumps({"settings": vars(settings), "problems": problems}),
            env={**os.environ, **limits},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()][-1:]
            raise RuntimeError(f"exit status {done.returncode}: {' '.join(said)[:300]}")
        with safe_open(path, framework="pt") as file:
            words = file.metadata()
            k = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict
    multiplied = [line.split(",") for line in done.stdout.splitlines() if ",exec,cpu,matmul," in line]
    kernel = multiplied[0][6] if multiplied else "PyTorch's own"
    return Played(kernel, k, **{part: json.loads(words[part]) for part in WORDS})


# ---------------------------------------------------------------- in that process


def main(path: str) -> None:
    """Standard output has what oneDNN says of its first matmul."""
    given = json.load(sys.stdin)
    settings = Settings(**{name: tuple(v) if isinstance(v, list) else v for name, v in given["settings"].items()})
    k, inputs, keys, rows = {}, {}, {}, []
    saying = _says_its_matmul()
    for layer, plan in given["problems"]:
        problem = problem_at(settings, layer, settings.tokens, plan)
        with saying:
            own = eager(problem)[1]
        saying = nullcontext()
        name, key = _name(problem), _key(settings, problem, eager_plan(problem))
        k[name], inputs[name], keys[name] = (
            own.cpu().contiguous(),
            digest(filter(torch.is_tensor, problem.inputs().values())),
            key,
        )
        if plan == given["problems"][0][1]:
            rows += [key | row for row in _against_itself(problem, own)]
    save_file(k, path, {part: json.dumps(found) for part, found in zip(WORDS, (inputs, keys, rows), strict=True)})


def _says_its_matmul() -> Any:
    mkldnn = torch.backends.mkldnn
    return mkldnn.verbose(mkldnn.VERBOSE_ON) if mkldnn.is_available() else nullcontext()


def _against_itself(problem: Problem, k: Tensor) -> Iterator[dict[str, Any]]:
    """Columns of rows of eager one token at a time, and (on a CPU) on other numbers of threads. k: its own."""
    arms = {str(Backend.EAGER_BATCH_OF_1): torch.cat([eager(token)[1] for token in _tokens(problem)])}
    if k.device.type == "cpu":
        before = torch.get_num_threads()
        for count in THREADS:
            torch.set_num_threads(count)
            arms[f"eager, {count} thread{'s' * (count > 1)}"] = eager(problem)[1]
        torch.set_num_threads(before)
    for backend, again in arms.items():
        yield {"backend": backend, **_errors(again, k)}


def _tokens(problem: Problem) -> Iterator[Problem]:
    """The problem a token at a time, without checking all its weights again each time."""
    for row in problem.x.split(1):
        token = copy.copy(problem)
        object.__setattr__(token, "x", row)
        yield token


# ---------------------------------------------------------------- both


def _name(problem: Problem) -> str:
    return f"layer {problem.layer}, {problem.weights}"


def _key(s: Settings, problem: Problem, plan: str) -> dict[str, Any]:
    row = {"model": s.model, "weights": problem.weights, "layer": problem.layer, "tokens": problem.tokens}
    return row | {"seed": s.seed, "plan": plan}


def _errors(actual: Tensor, reference: Tensor) -> dict[str, float]:
    row = error_stats(actual=actual, reference=reference).row()
    return {column: row[column] for column in KEPT}


if __name__ == "__main__":
    main(sys.argv[1])
