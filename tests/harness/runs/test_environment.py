"""The environment of a run: two arithmetics of eager are two environments, and a commit is this code's own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fake_nvml import NVMLError, fake_nvml
from support import ROOT

from castpoint.harness.runs import environment
from castpoint.harness.runs.environment import ISAS, commit, describe, dispatch, matmul_arithmetic, sources
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
                assert ("AVX-512" in line or "AVX10" in line) == ("avx512" in isa)
                assert ("bfloat16" in line) == ("bf16" in isa or "amx" in isa)


def test_runs_of_two_arithmetics_are_two_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "commit", lambda: "clean")
    on_a_cpu_with(monkeypatch, AVX2, AVX512, BF16)
    first = Records(tmp_path, {"model": "m"}, describe("cpu"))
    assert Records(tmp_path, {"model": "m"}, describe("cpu")).run_id == first.run_id
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert Records(tmp_path, {"model": "m"}, describe("cpu")).run_id != first.run_id


@pytest.mark.parametrize(
    ("said", "driver"),
    [("580.159.04", "580.159.04"), (b"525.60.13", "525.60.13"), (NVMLError("Unknown Error"), "unknown")],
)
def test_the_driver_of_a_gpu_is_what_nvml_says(said: object, driver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, DriverVersion=said)
    gpu = describe("cuda")["gpu"]
    assert gpu["driver"] == driver and (gpu["name"], gpu["l2_bytes"]) == ("NVIDIA H200", 60 << 20)


def test_without_nvml_the_driver_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_nvml(monkeypatch, Init=NVMLError("Driver Not Loaded"))
    assert describe("cuda")["gpu"]["driver"] == "unknown"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert describe("cuda")["gpu"]["driver"] == "unknown"


def laid_out(where: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(content)
    return where


TREE = {
    "kernels/a.py": "1", "kernels/README.md": "2", "variants/b.py": "3", "harness/x/c.py": "4", "castpoint/d.py": "5",
    "harness/x/data/claims.csv": "6", "harness/x/data/README.md": "7", "tests/e.py": "8", "README.md": "9",
}  # fmt: skip


def test_sources_are_the_code_on_disk_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hashed(name: str, **changes: str) -> str:
        monkeypatch.setattr(environment, "ROOT", laid_out(tmp_path / name, TREE | changes))
        return sources()

    first = hashed("first")
    assert len(first) == 12 and int(first, 16) >= 0
    for place, other in enumerate(("kernels/README.md", "harness/x/data/README.md", "tests/e.py", "README.md",
                                   "kernels/dispatch.csv", "kernels/__pycache__/a.pyc")):  # fmt: skip
        assert hashed(f"same {place}", **{other: "changed"}) == first, other
    code = ("kernels/a.py", "variants/b.py", "harness/x/c.py", "castpoint/d.py", "harness/x/data/claims.csv")
    changed = {hashed(f"other {place}", **{name: "changed"}) for place, name in enumerate((*code, "kernels/new.py"))}
    assert len(changed) == 6 and first not in changed
    (tmp_path / "first" / "kernels" / "a.py").rename(tmp_path / "first" / "kernels" / "z.py")
    monkeypatch.setattr(environment, "ROOT", tmp_path / "first")
    assert sources() not in {first, *changed}, "a file's path counts"


def test_an_installed_package_has_the_checkouts_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There castpoint's own files lie beside the three folders."""
    monkeypatch.setattr(environment, "ROOT", laid_out(tmp_path / "checkout", TREE))
    first = sources()
    moved = {name.removeprefix("castpoint/"): content for name, content in TREE.items() if name[:5] != "tests"}
    monkeypatch.setattr(environment, "ROOT", laid_out(tmp_path / "wheel", moved))
    assert sources() == first


def test_dispatch_is_recorded_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "ROOT", laid_out(tmp_path, TREE))
    assert dispatch() == "none"
    found = {dispatch() for rows in ("a", "b") if laid_out(tmp_path, {"kernels/dispatch.csv": rows})}
    assert len(found) == 2 and "none" not in found
    monkeypatch.undo()
    facts = describe("cpu")
    assert (facts["sources"], facts["dispatch"]) == (sources(), dispatch())


def test_a_plus_says_that_code_differs_from_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dispatch table that was measured here is no code; a file that git does not know is."""
    monkeypatch.setattr(environment, "ROOT", laid_out(tmp_path, TREE))
    monkeypatch.delenv("CASTPOINT_COMMIT", raising=False)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    head = commit()
    assert len(head) == 12
    for written, plus in (
        ("kernels/dispatch.csv", ""),
        ("README.md", ""),
        ("kernels/new.py", "+"),
        ("kernels/a.py", "+"),
    ):
        laid_out(tmp_path, {written: "changed"})
        assert commit() == head + plus, written
        (tmp_path / "kernels" / "new.py").unlink(missing_ok=True)
    monkeypatch.setenv("CASTPOINT_COMMIT", "told")
    assert commit() == "told"


def test_a_commit_is_that_of_this_code_and_of_no_repository_around_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CASTPOINT_COMMIT", raising=False)
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
