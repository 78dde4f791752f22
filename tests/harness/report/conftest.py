"""What several tests of the report read."""

from pathlib import Path

import pytest
from invented_gpu import invent_by_hand


@pytest.fixture(scope="session")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the invented run of a GPU; nobody writes into it."""
    folder = tmp_path_factory.mktemp("invented")
    invent_by_hand(folder).finish()
    return folder
