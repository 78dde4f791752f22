"""A file of a package is executed without what it imports, and leaves nothing behind."""

import sys
from pathlib import Path

import pytest
from torch import nn

from castpoint.harness.peers.files_of_wheels import load_file, module_of

FILE = """
import functools
from engine.flags import is_hip
from engine.registry import Base, register
from .utils import number
if is_hip():
    raise RuntimeError

@register("norm")
@functools.lru_cache
def norm(x):
    return x + number

@register
class Norm(Base):
    def __init__(self):
        super().__init__()
"""


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed, and whose own modules are not to be had."""
    (tmp_path / "engine-1.0.dist-info").mkdir()
    (tmp_path / "engine-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: engine\nVersion: 1.0\n")
    (tmp_path / "engine" / "layers").mkdir(parents=True)
    (tmp_path / "engine" / "layers" / "norm.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    load_file.cache_clear()


def test_a_file_is_executed_alone(engine: None) -> None:
    own = module_of("engine")
    sys.modules["engine"] = own
    try:
        module = load_file("engine", "engine/layers/norm.py", module_of("engine.layers.utils", number=2))
        assert module.norm(1) == 3 and issubclass(module.Norm, nn.Module)
        module.Norm()
        assert sys.modules["engine"] is own and "engine.layers.utils" not in sys.modules
    finally:
        del sys.modules["engine"]


def test_what_is_not_there_is_an_import_error(engine: None) -> None:
    with pytest.raises(ImportError, match=r"engine 1\.0 has no engine/norm\.py"):
        load_file("engine", "engine/norm.py")
    with pytest.raises(ImportError):
        load_file("motor", "motor/norm.py")
    assert "engine" not in sys.modules
