"""The tests hold interpreted kernels to their specs, on the CPU, also beside a GPU; `make gpu` checks compiled ones.

The variable must be set before the kernels are imported. `make compare` sets it to 0, to time what runs compiled.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0" else "cpu"
