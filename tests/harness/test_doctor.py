"""What is missing on a machine, and its cure."""

import pytest
from commands import command

from castpoint.harness.doctor import checks, cure_of, interpreter, interpreter_with_numpy


def test_doctor_finds_nothing_here_and_names_what_is_in_the_way(monkeypatch) -> None:
    assert all(check.ok for check in checks()), [check for check in checks() if not check.ok]
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert any(not check.ok and "g++" in check.cure for check in checks())


def test_doctor_sees_an_interpreter_variable_that_came_too_late(monkeypatch) -> None:
    assert interpreter().ok
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # kernels were imported interpreted
    assert not interpreter().ok and "before the kernels are imported" in interpreter().cure


@pytest.mark.parametrize(
    ("triton", "numpy", "ok"), [("3.6.0", "2.4.0", False), ("3.6.0", "2.3.5", True), ("3.7.0+git1", "2.10.1", True)]
)
def test_doctor_knows_the_numpy_that_an_interpreter_fails_under(triton: str, numpy: str, ok: bool, monkeypatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"triton": triton, "numpy": numpy}.__getitem__)
    assert interpreter_with_numpy().ok == ok and "numpy<2.4" in interpreter_with_numpy().cure


def test_every_package_of_ours_has_a_cure_and_no_other() -> None:
    assert cure_of("transformers") == "pip install 'castpoint[models]'"
    assert cure_of("liger_kernel") == "pip install 'castpoint[studies]'"
    assert cure_of("pynvml") == "pip install 'castpoint[gpu]'"
    assert "pip install castpoint" in cure_of("pandas")
    assert cure_of("castpoint") is None and cure_of("nonsense") is None


def test_doctor_command() -> None:
    result = command("doctor", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout
