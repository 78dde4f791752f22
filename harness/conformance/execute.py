"""Every kernel as a launch would compile it for a GPU that is not here, its PTX run on this CPU, held to its spec.

The checks are those that `make gpu` begins with, on every plan; and bit equality of every tile that tuning may choose,
for a plan of each place of rstd. Sums on a tensor core are in another order here, and rounded instead of truncated: on
exact inputs neither counts, on drawn ones the envelope holds both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

from castpoint.harness.conformance.cuda import TOKENS, KernelCheck, check_kernels, kernel_checks
from castpoint.harness.problems.grid import STANDS_FOR
from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import Check, ExecutedRow
from castpoint.kernels.config import candidates, unsupported
from castpoint.variants.catalogue import PLANS

HERE = SimpleNamespace(device="cpu", probe=lambda: None)  # what the checks ask of timing.cuda.Cuda; nothing here breaks


def execute_kernels(records: Records, target: str) -> None:
    """One row of `executed` a check."""
    with executed(target):
        check_kernels(records, HERE, [*kernel_checks(), *tile_checks()], ExecutedRow, target=target)


def tile_checks() -> Iterator[KernelCheck]:
    """One of each tile of gpu.tune, on the problem of the exact checks."""
    tiles = dict.fromkeys(
        (config, 1 if tokens == 1 else TOKENS)
        for tokens in (1, 16, 64, 256)
        for config in candidates(tokens, 1024, 8, 128)
        if config.kernel != "separate"
    )
    for name, (config, tokens) in itertools.product(STANDS_FOR.values(), tiles):
        if not unsupported(config, PLANS[name].plan):
            yield name, config, Check.EXACT, False, tokens
