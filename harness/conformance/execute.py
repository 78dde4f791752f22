"""Every kernel as a launch would compile it for a GPU that is not here, its PTX run on this CPU, held to its spec.

The checks are those of a GPU run, on every plan, and on every tile that tuning may choose for a plan of each place of
rstd. Each runs once, since nothing here runs side by side, with fewer heads where they are drawn, and exact inputs end
in a step of D that is not whole. Sums on a tensor core are in another order here, and rounded instead of truncated: on
exact inputs neither counts, on drawn ones the envelope holds both.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

from castpoint.harness.conformance.cuda import (
    AGAINST_SPEC,
    HEAD_DIM,
    TOKENS,
    Reference,
    checked,
    problems_for,
    reference,
)
from castpoint.harness.problems import grid
from castpoint.harness.problems.exact import PRODUCTS
from castpoint.harness.problems.quantised import drawn_quantised, exact_quantised
from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.progress import track
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ExecutedRow
from castpoint.harness.runs.words import Check
from castpoint.kernels.config import Config, candidates, default_config, unsupported
from castpoint.kernels.dispatch import read_table
from castpoint.kernels.plan import KEEP, RNE, RTZ, CastPlan
from castpoint.kernels.quantised import BLOCK_BYTES
from castpoint.variants.catalogue import PLANS
from castpoint.variants.problem import Problem
from castpoint.variants.quantised import run_quantised

HERE = SimpleNamespace(device="cpu", probe=lambda: None)  # what the checks ask of timing.cuda.Cuda; nothing here breaks
FEW = Config("fused", "none", 16, 128, 4, 3)  # of the kernel that reads blocks, for one token
BLOCKS_WIDTH = 480  # 15 blocks
EXACT_WIDTH = 1008  # channels: the same binaries as for 1,024, whose last step of 64 or of 128 is not whole
DEFAULT = "default"  # the config of a launch that is given none
KernelCheck = tuple[str, Config | None, Check, bool, int]  # plan, config, check, rope, tokens


def execute_kernels(records: Records, target: str) -> None:
    """One row of `executed` a check."""
    with executed(target):
        execute_blocks(records, target)
        for name, config, check, rope, tokens in track([*kernel_checks(), *tile_checks()], target):
            key = {"target": target, "plan": name, "config": str(config or DEFAULT)}
            key |= {"rope": rope, "tokens": tokens, "check": check}
            if not records.has(ExecutedRow, **key):
                plan, wanted = PLANS[name].plan, wanted_of(name, check, rope, tokens)
                records.add(ExecutedRow(**key, **checked(plan, config, wanted, check, HERE, runs=1)))


def execute_blocks(records: Records, target: str) -> None:
    """The same of the kernel that reads W in blocks. Its rows name the blocks and how W is rounded before the tiles."""
    for name, format, weight, config, check in track([*block_checks()], f"{target}, W in blocks"):
        tokens = 1 if config else TOKENS
        key = {"target": target, "plan": name, "config": f"{format} {weight}, {config or DEFAULT}"}
        key |= {"rope": False, "tokens": tokens, "check": check}
        if not records.has(ExecutedRow, **key):
            plan = PLANS[name].plan
            wanted = reference(plan, check, block_problems(plan, format, weight, check, tokens))
            found = checked(plan, config, wanted, check, HERE, runs=1, run=run_quantised)
            records.add(ExecutedRow(**key, **found))


def block_checks() -> Iterator[tuple[str, str, str, Config | None, Check]]:
    """Plan, blocks, how weights are held, config and check: a plan of each place of rstd and each matmul."""
    plans = {"hf": RNE, "deferred": RNE, "truncating": RTZ, "fp32-tf32x3": RNE, "fp32": KEEP}
    for (name, weight), format, check in itertools.product(plans.items(), BLOCK_BYTES, AGAINST_SPEC):
        for config in (None, FEW) if PLANS[name].plan.matmul == "bf16" else (None,):
            yield name, format, weight, config, check


def block_problems(plan: CastPlan, format: str, weight: str, check: Check, tokens: int) -> list[Problem]:
    """The problems of a check; exact ones end in a step of D that is not whole."""
    if check == Check.EXACT:
        shape = {"tokens": tokens, "hidden_size": BLOCKS_WIDTH, "head_dim": HEAD_DIM}
        return [exact_quantised(plan, format, weight, products=products, **shape) for products in PRODUCTS]
    drawn = problems_for(plan, check, HERE.device, False, tokens)
    return [drawn_quantised(few_heads(problem), format, weight) for problem in drawn]


@functools.lru_cache(maxsize=2 * len(AGAINST_SPEC))  # tiles of a plan share it
def wanted_of(name: str, check: Check, rope: bool, tokens: int) -> Reference:
    """What a check of a plan asks."""
    plan, exact = PLANS[name].plan, check == Check.EXACT
    problems = problems_for(plan, check, HERE.device, rope, tokens, EXACT_WIDTH if exact else 1024)
    return reference(plan, check, problems if exact else [few_heads(problem) for problem in problems])


def few_heads(p: Problem) -> Problem:
    """A problem with the first heads alone, as many as exact problems have: four of q, two of k and of v."""
    counts = {p.num_q_heads + p.num_kv_heads: 2, p.num_q_heads: 2, 0: 4}  # first head -> how many from there
    kept = sorted(first + i for first, count in counts.items() for i in range(count))
    weight = p.qkv_weight.reshape(p.num_heads, p.head_dim, -1)[kept].flatten(0, 1)
    return p.replace(qkv_weight=weight, num_q_heads=4, num_kv_heads=2)


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
    """Two of each tile of gpu.tune, for a plan of each place of rstd."""
    tiles = dict.fromkeys(
        (config, 1 if tokens == 1 else max(TOKENS, config.block_m + 6))  # a whole tile and one that is not
        for tokens in (1, 16, 64, 256)
        for config in candidates(tokens, 1024, 8, 128)
        if config.kernel != "separate"
    )
    for name, (config, tokens), check in itertools.product(grid.STANDS_FOR.values(), tiles, AGAINST_SPEC):
        if not unsupported(config, PLANS[name].plan):
            yield name, config, check, False, tokens
