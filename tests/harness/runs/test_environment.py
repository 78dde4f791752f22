"""The environment of a run: two arithmetics of eager are two environments, and a commit is this code's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT

from castpoint.harness.runs import environment
from castpoint.harness.runs.environment import ISAS, commit, describe, matmul_arithmetic
from castpoint.harness.runs.records import Records

AMX, BF16, AVX512, AVX2 = "amx_tile", "avx512_bf16", "avx512", "avx2"


def on_a_cpu_with(monkeypatch: pytest.MonkeyPatch, *features: str, limit: str | None = None) -> dict:
    """matmul_arithmetic of a processor that has these, under that ONEDNN_MAX_CPU_ISA."""
    for name in (AMX, BF16, AVX512, AVX2):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda name=name: name in features)
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    return matmul_arithmetic()


@pytest.mark.parametrize(
    ("features", "limit", "isa", "native"),
    [
        ((AVX2,), None, "avx2", False),
        ((AVX2, AVX512), None, "avx512_core", False),
        ((AVX2, AVX512, BF16), None, "avx512_core_bf16", True),
        ((AVX2, AVX512, BF16, AMX), None, "avx512_core_amx", True),
        ((AVX2, AVX512, BF16, AMX), "AVX512_CORE_BF16", "avx512_core_bf16", True),
        ((AVX2, AVX512, BF16, AMX), "avx512_core_fp16", "avx512_core_fp16", True),
        ((AVX2, AVX512, BF16, AMX), "AVX512_CORE_VNNI", "avx512_core_vnni", False),
        ((AVX2, AVX512, BF16), "AVX2", "avx2", False),
        ((AVX2, AVX512), "AVX512_CORE_AMX", "avx512_core", False),  # more is allowed than there is
        ((AVX2, AVX512, BF16), "DEFAULT", "avx512_core_bf16", True),
        ((AVX2, AVX512, BF16), "no such", "avx512_core_bf16", True),
        ((), None, "sse41", False),
    ],
)
def test_what_onednn_may_use(
    features: tuple[str, ...], limit: str | None, isa: str, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = on_a_cpu_with(monkeypatch, *features, limit=limit)
    assert (found["onednn_isa"], found["native_bf16"]) == (isa, native)


def test_the_older_name_of_the_limit_counts_and_the_newer_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_cpu_with(monkeypatch, AVX2, AVX512, BF16)
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert matmul_arithmetic()["onednn_isa"] == "avx2"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    assert matmul_arithmetic()["onednn_isa"] == "avx512_core"


def test_without_onednn_nothing_is_native(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_a_cpu_with(monkeypatch, AVX2, AVX512, BF16)["onednn"] == torch.backends.mkldnn.is_available()
    with torch.backends.mkldnn.flags(enabled=False):
        found = on_a_cpu_with(monkeypatch, AVX2, AVX512, BF16)
    assert (found["onednn"], found["native_bf16"]) == (False, False)


def test_onednn_itself_says_the_same_of_this_cpu() -> None:
    """Under avx512_core and the machine's own set, as far as the processor reaches."""
    code = "import torch, castpoint.harness.runs.environment as e; a = torch.ones(64, 64).to(torch.bfloat16); a @ a"
    code += "; print(e.matmul_arithmetic()['onednn_isa'])"
    for limit in ("AVX512_CORE", "DEFAULT"):
        command = ["env", "ONEDNN_VERBOSE=1", f"ONEDNN_MAX_CPU_ISA={limit}", sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        (isa,) = (line for line in done.stdout.splitlines() if not line.startswith("onednn_verbose"))
        assert isa in ISAS
        for line in done.stdout.splitlines():
            if ",info,cpu,isa:" in line:
                assert ("AVX-512" in line) == ("avx512" in isa)
                assert ("bfloat16" in line) == ("bf16" in isa or "amx" in isa)


def test_runs_of_two_arithmetics_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "commit", lambda: "clean")
    on_a_cpu_with(monkeypatch, AVX2, AVX512, BF16)
    first = Records(tmp_path, {"model": "m"}, describe("cpu"))
    assert Records(tmp_path, {"model": "m"}, describe("cpu")).run_id == first.run_id
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert Records(tmp_path, {"model": "m"}, describe("cpu")).run_id != first.run_id


def test_a_commit_is_that_of_this_code_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    inside = tmp_path / "lib" / "castpoint"
    inside.mkdir(parents=True)
    monkeypatch.setattr(environment, "ROOT", inside)
    monkeypatch.setattr(environment, "version", lambda package: "1.2.3" if package == "castpoint" else None)
    assert commit() == "1.2.3"
    monkeypatch.setattr(environment, "version", lambda package: None)
    assert commit() == "unknown"
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    monkeypatch.setattr(environment, "ROOT", ROOT)
    assert not head or head.startswith(commit().removesuffix("+"))
