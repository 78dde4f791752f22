"""Records: tidy CSV files, one row a measurement, appended and flushed as it is made.

environment.json beside them says of every run_id with which settings, on which machine and by which versions it
was measured. A run that was stopped is continued: rows it has are not measured again.
"""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Any

from castpoint.harness.runs.errors import UserError, writing

SCHEMA = 1
TABLES: dict[str, tuple[str, ...]] = {
    "errors": tuple(
        "run_id model weights layer tokens seed plan backend output reference max_abs mean_abs rms rel_rms max_ulp "
        "p99_ulp mean_ulp share_equal signed_mean at_token at_head at_channel status reason".split()
    ),
    "speed": tuple(
        "run_id model tokens plan backend regime p10_us p50_us p90_us bytes flops gbps tflops roofline_share "
        "speedup_vs_eager speedup_vs_compile status reason".split()
    ),
    "amplification": tuple(
        "run_id model weights layer plan k_norm_max gain_predicted_max gain_measured_max k_max_abs_before "
        "k_max_abs_after k_rel_rms_before k_rel_rms_after logit_rms_error logit_max_error softmax_tv_mean "
        "softmax_tv_max top_key_flips status reason".split()
    ),
    "draws": tuple(
        "run_id model weights layer tokens seed plan k_norm_max k_max_abs_after logit_rms_error softmax_tv_mean "
        "top_key_flips status reason".split()
    ),
    "ulps": tuple(
        "run_id model weights layer plan backend output reference ulp_from ulp_to share status reason".split()
    ),
    "channels": tuple(
        "run_id model weights layer plan channel k_norm_weight gain_predicted gain_measured status reason".split()
    ),
    "implementations": tuple(
        "run_id implementation package versions kind how device plan share_equal runner_up_share_equal seconds status "
        "reason".split()
    ),
    "budget": tuple(
        "run_id model weights layer tokens plan backend measure player shapley share total kernel_vs_spec "
        "kernel_vs_spec_share status reason".split()
    ),
    "cases": tuple(
        "run_id case source where before after measure measured unit measured_low measured_high claimed claimed_low "
        "claimed_high claimed_text verdict why share_differ max_ulp signed_bias growth status reason".split()
    ),
    "audit": tuple(
        "run_id target kernel plan keywords declared ttir machine roundings matmul not_followed fused expanded matrix "
        "registers spills shared status reason".split()
    ),
    "executed": tuple("run_id target plan config tokens check share_equal status reason".split()),
    "model_layers": tuple(
        "run_id model weights text prompt arm backend reference layer max_abs rms rel_rms one_minus_cosine k_norm_max "
        "k_max_abs k_rel_rms k_p99_ulp attention_logit_rms status reason".split()
    ),
    "model_tokens": tuple(
        "run_id model weights text prompt tokens arm backend reference logit_max kl_mean kl_max top1 top5 dlogp_p50 "
        "dlogp_p99 dlogp_max parts_at nll status reason".split()
    ),
    "model_dlogp": tuple("run_id model weights text prompt arm backend reference above tokens status reason".split()),
    "gpu_checks": tuple("run_id plan config check share_equal max_ulp status reason".split()),
    "gpu_points": tuple("run_id model tokens regime status reason".split()),
    "gpu_speed": tuple(
        "run_id model tokens regime kind arm function config copies cold rounds laps bytes flops floor_us p10_us "
        "p50_us p90_us gbps tflops roofline_share p1 speedup_p1_p10 speedup_p1_p50 speedup_p1_p90 noise_p10 noise_p90 "
        "sm_mhz memory_mhz watts celsius slowed_by status reason".split()
    ),
    "configs": tuple("run_id kernel plan target keywords registers spills shared matrix status reason".split()),
    "tuning": tuple(
        "run_id model tokens scale config kernel prepass block_m block_k num_warps num_stages splits cold p10_us "
        "p50_us p90_us speedup_separate noise_p10 noise_p90 status reason".split()
    ),
    "fingerprints": tuple(
        "run_id source kind planted answered share_equal runner_up_share_equal seconds status reason".split()
    ),
}
# What tells one row of a run from another.
KEYS: dict[str, tuple[str, ...]] = {
    "errors": ("weights", "layer", "tokens", "plan", "backend", "output", "reference"),
    "speed": ("tokens", "plan", "backend"),
    "amplification": ("weights", "layer", "plan"),
    "draws": ("weights", "layer", "seed", "plan"),
    "ulps": ("weights", "layer", "plan", "output", "reference", "ulp_from"),
    "channels": ("weights", "layer", "plan", "channel"),
    "implementations": ("implementation", "kind", "how"),
    "budget": ("weights", "layer", "tokens", "plan", "backend", "measure", "player"),
    "cases": ("case", "source", "measure"),
    "audit": ("target", "kernel", "plan", "keywords"),
    "executed": ("target", "plan", "config", "tokens", "check"),
    "model_layers": ("model", "weights", "text", "prompt", "arm", "reference", "layer"),
    "model_tokens": ("model", "weights", "text", "prompt", "arm", "reference"),
    "model_dlogp": ("model", "weights", "text", "prompt", "arm", "reference", "above"),
    "gpu_checks": ("plan", "config", "check"),
    "gpu_points": ("model", "tokens", "regime"),
    "gpu_speed": ("model", "tokens", "regime", "arm"),
    "configs": ("kernel", "plan", "target", "keywords"),
    "tuning": ("model", "tokens", "scale", "config"),
    "fingerprints": ("source", "kind", "planted"),
}


class Records:
    """The results folder of one run. Raises UserError where the folder cannot be used as it is."""

    def __init__(self, folder: Path, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        self.folder = folder
        self.environment_path = folder / "environment.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise UserError(
                f"results folder {folder} cannot be written ({error.strerror}): choose another with --results"
            ) from None
        self.runs = load_runs(folder)
        self.run_id = self._unfinished(settings, environment) or self._started(settings, environment)
        self.done: dict[str, set[tuple[str, ...]]] = {table: self._read_keys(table) for table in TABLES}

    def has(self, table: str, **key: object) -> bool:
        """Whether this run has that row already."""
        return tuple(_text(key[name]) for name in KEYS[table]) in self.done[table]

    def add(self, table: str, *, status: str = "ok", reason: str = "", **values: object) -> None:
        """Appends one row and flushes it. Columns without a value stay empty."""
        row = {"run_id": self.run_id, "status": status, "reason": " ".join(reason.split()), **values}
        unknown = set(row) - set(TABLES[table])
        if unknown:
            raise ValueError(f"{table}.csv has no column {', '.join(sorted(unknown))}")
        with writing(self.folder), open(self.folder / f"{table}.csv", "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow([_text(row.get(column, "")) for column in TABLES[table]])
        self.done[table].add(tuple(_text(row[name]) for name in KEYS[table]))

    def rows(self, table: str) -> list[dict[str, str]]:
        """This run's rows so far."""
        with open(self.folder / f"{table}.csv", newline="") as file:
            return [row for row in csv.DictReader(file) if row["run_id"] == self.run_id]

    def note(self, **facts: object) -> None:
        """Adds facts about this run to environment.json."""
        self.runs[self.run_id].update(facts)
        text = json.dumps({"schema": SCHEMA, "runs": self.runs}, indent=1) + "\n"
        draft = self.environment_path.with_suffix(".tmp")
        with writing(self.folder):
            draft.write_text(text)
            draft.replace(self.environment_path)

    def finish(self) -> None:
        self.note(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    def _unfinished(self, settings: dict[str, Any], environment: dict[str, Any]) -> str | None:
        settings, environment = json.loads(json.dumps([settings, environment]))
        for run_id, run in reversed(self.runs.items()):
            same = run["settings"] == settings and run["environment"] == environment
            if same and "finished" not in run and not environment.get("commit", "").endswith("+"):
                return run_id  # a `+` is a checkout with changes, and two such may differ
        return None

    def _started(self, settings: dict[str, Any], environment: dict[str, Any]) -> str:
        for table in TABLES:
            check_table(self.folder / f"{table}.csv", TABLES[table])
        self.run_id = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
        while self.run_id in self.runs:
            self.run_id += "b"
        self.runs[self.run_id] = {"settings": settings, "environment": environment}
        self.note()
        return self.run_id

    def _read_keys(self, table: str) -> set[tuple[str, ...]]:
        path = self.folder / f"{table}.csv"
        check_table(path, TABLES[table])
        if not path.exists():
            path.write_text(",".join(TABLES[table]) + "\n")
        _cut_partial_row(path)
        return {tuple(row[name] for name in KEYS[table]) for row in self.rows(table)}


def load_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs of a results folder by run_id, oldest first; none if it has no environment.json yet.

    Raises UserError if environment.json is not of this schema.
    """
    path = folder / "environment.json"
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
        schema, runs = content["schema"], content["runs"]
        runs.items()
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is not a record of this lab: move it away or choose another --results") from None
    if schema != SCHEMA:
        raise UserError(f"{path} has schema {schema}, this version writes {SCHEMA}: choose another --results")
    return runs


def check_table(path: Path, columns: tuple[str, ...]) -> None:
    """Raises UserError if the file exists with other columns."""
    if not path.exists():
        return
    with open(path, newline="") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != columns:
        raise UserError(
            f"{path} was written with other columns ({len(header)}, not these {len(columns)}): choose another --results"
        )


def _cut_partial_row(path: Path) -> None:
    """Drops what a killed run left of its last row, so that nothing is appended to half a line."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
