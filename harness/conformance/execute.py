"""Every kernel as a launch would compile it for a GPU that is not here, its PTX run on this CPU, held to its spec.

The checks are those of a GPU run, on every plan; and bit equality of every tile that tuning may choose, for a plan of
each place of rstd. Sums on a tensor core are in another order here, and rounded instead of truncated: on exact inputs
neither counts, on drawn ones the envelope holds both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace

from castpoint.harness.conformance.cuda import AGAINST_SPEC, HEAD_DIM, TOKENS, checked, reference
from castpoint.harness.problems import grid
from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import Check, ExecutedRow
from castpoint.kernels.config import Config, candidates, default_config, unsupported
from castpoint.kernels.dispatch import read_table
from castpoint.kernels.plan import CastPlan
from castpoint.variants.catalogue import PLANS

HERE = SimpleNamespace(device="cpu", probe=lambda: None)  # what the checks ask of timing.cuda.Cuda; nothing here breaks
DEFAULT = "default"  # the config of a launch that is given none
KernelCheck = tuple[str, Config | None, Check, bool, int]  # plan, config, check, rope, tokens


def execute_kernels(records: Records, target: str) -> None:
    """One row of `executed` a check."""
    with executed(target):
        for name, config, check, rope, tokens in track([*kernel_checks(), *tile_checks()], target):
            key = {"target": target, "plan": name, "config": str(config or DEFAULT)}
            key |= {"rope": rope, "tokens": tokens, "check": check}
            if not records.has(ExecutedRow, **key):
                plan = PLANS[name].plan
                wanted = reference(plan, check, HERE.device, rope, tokens)
                records.add(ExecutedRow(**key, **checked(plan, config, wanted, check, HERE)))


def configs_of(plan: CastPlan) -> dict[str, Config | None]:
    """The default config, the plan's separate kernels or default tiles, and those of the dispatch table, by words."""
    separate, listed = Config("separate"), [c for configs in read_table().values() for c in configs.values()]
    other = default_config(HEAD_DIM, plan, False) if unsupported(separate, plan) else separate
    fit = {str(c): c for c in [other, *listed] if not unsupported(c, plan)}
    return {DEFAULT: None, **(fit if plan.matmul == "bf16" else {})}


def kernel_checks() -> Iterator[KernelCheck]:
    """Two of each plan and config, exact inputs and drawn ones; two more where the plan is timed with RoPE too; and for
    split-K, which has another binary for it, of one token."""
    for name, named in PLANS.items():
        for config in configs_of(named.plan).values():
            counts = (TOKENS, 1) if config and config.kernel == "split-k" else (TOKENS,)
            ropes = (False, True) if name in grid.MAIN_PLANS else (False,)
            for rope, tokens, check in itertools.product(ropes, counts, AGAINST_SPEC):
                yield name, config, check, rope, tokens


def tile_checks() -> Iterator[KernelCheck]:
    """One of each tile of gpu.tune, on the problem of the exact checks."""
    tiles = dict.fromkeys(
        (config, 1 if tokens == 1 else TOKENS)
        for tokens in (1, 16, 64, 256)
        for config in candidates(tokens, 1024, 8, 128)
        if config.kernel != "separate"
    )
    for name, (config, tokens) in itertools.product(grid.STANDS_FOR.values(), tiles):
        if not unsupported(config, PLANS[name].plan):
            yield name, config, Check.EXACT, False, tokens
