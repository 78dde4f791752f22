"""Which config a launch takes: a table of measurements, and what happens where it says nothing.

dispatch.csv holds, for a GPU, a shape and a number of tokens, the config that was fastest with cold weights, a row for
each place where rstd may be applied (`scale`): `castpoint gpu` measures it, `castpoint gpu --from-records` writes it.
Between two numbers of tokens the row of the larger holds, beyond the largest that of the largest, if it is one of many
tokens: a table that was cut off at one token says nothing of 4096. Times are those without RoPE; launches with it take
the same config, whose registers and spills `castpoint audit --configs` shows with it too.

Without a row (another GPU, another shape, operands wider than bf16) `reasoned` says what runs, by arithmetic alone. The
first such launch of a shape says so.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import warnings
from pathlib import Path

import torch

from .config import MANY_TOKENS, Config, candidates, default_config, head_block, unsupported
from .plan import CastPlan

TABLE = Path(__file__).parent / "dispatch.csv"
KEY = ("gpu", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "scale", "tokens")
FEW_TOKENS = 16  # up to so many the kernel for one token does the same work
SHARED = 227 * 1024  # bytes of shared memory a block that candidates are sized for: from an H100 on
COLUMNS = (*KEY, *(field.name for field in dataclasses.fields(Config)))

Shape = tuple[int, int, int, int]  # hidden_size, num_q_heads, num_kv_heads, head_dim
Table = dict[tuple[str, Shape, str], dict[int, Config]]  # (gpu, shape, scale) -> tokens -> config


def read_table(path: Path = TABLE) -> Table:
    """The table in a file; empty where there is no file. Raises ValueError for a file with other columns."""
    table: Table = {}
    if not path.exists():
        return table
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            named = ", ".join(COLUMNS)
            raise ValueError(f"{path} must have the columns {named}: write it with `castpoint gpu --from-records`")
        for row in reader:
            hidden_size, num_q_heads, num_kv_heads, head_dim = (int(row[name]) for name in KEY[1:5])
            shape = hidden_size, num_q_heads, num_kv_heads, head_dim
            table.setdefault((row["gpu"], shape, row["scale"]), {})[int(row["tokens"])] = Config.of_row(row)
    return table


def write_table(table: Table, path: Path = TABLE) -> None:
    """Writes the whole table, sorted."""
    lines = [
        [gpu, *shape, scale, tokens, *dataclasses.astuple(config)]
        for (gpu, shape, scale), configs in table.items()
        for tokens, config in configs.items()
    ]
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *sorted(lines)])


def dispatch(table: Table, gpu: str, shape: Shape, tokens: int, plan: CastPlan) -> Config | None:
    """The table's config for that launch, or None."""
    configs = table.get((gpu, shape, plan.scale), {}) if plan.matmul == "bf16" else {}
    fit = [known for known in sorted(configs) if known >= tokens] or [known for known in configs if known > MANY_TOKENS]
    if not fit:
        return None
    config = configs[fit[0] if fit[0] >= tokens else max(fit)]
    return None if unsupported(config, plan) else config


@functools.lru_cache(maxsize=4096)  # a launch asks
def reasoned(shape: Shape, tokens: int, plan: CastPlan) -> Config:
    """What runs where the table says nothing: chosen by arithmetic, nobody timed it.

    Counting bytes and launches, our kernels gain 7 to 25 % over three separate ones at one token (32b to 0.6b), where
    the time is that of reading W. Up to 16 tokens they do the same work, one tile of 16. At 64 tokens they gain 7 % to
    lose 4 %, at 256 they lose 4 to 37 %, at 4096 about 30 %: L2 cannot feed their tiles. So to 16 tokens the first of
    `candidates` that expresses the plan; beyond, `separate` where that does, else again the first candidate. Operands
    wider than bf16, and heads wider than any candidate was sized for, take default_config.
    """
    hidden_size, num_q_heads, num_kv_heads, head_dim = shape
    if plan.matmul != "bf16" or head_block(head_dim) > 256:
        return default_config(head_dim, plan, False)
    separate = Config("separate")
    if tokens > FEW_TOKENS and not unsupported(separate, plan):
        return separate
    found = candidates(max(1, tokens), hidden_size, num_q_heads + 2 * num_kv_heads, head_dim)
    return next(config for config in found if not unsupported(config, plan))


def chosen(gpu: str, shape: Shape, tokens: int, plan: CastPlan) -> Config:
    """The config of a launch on the GPU of that name (torch.cuda.get_device_name): the table's, or the reasoned one,
    which is said once."""
    config = dispatch(_committed(), gpu, shape, tokens, plan)
    if config is not None:
        return config
    if plan.matmul == "bf16":  # wider operands have no rows by design
        _say_once(gpu, shape)
    return reasoned(shape, tokens, plan)


def launch_config(device: torch.device, shape: Shape, tokens: int, plan: CastPlan, interpreted: bool) -> Config:
    """The config of a launch that is given none: `chosen` on an NVIDIA GPU whose shared memory holds what candidates
    ask for, or that was tuned; else default_config: interpreted, on a CPU, on AMD's GPUs, where split-K is refused, and
    on smaller ones.

    So on a GPU it depends on the number of tokens, and a row's bits may depend on its batch.
    """
    if not interpreted and device.type == "cuda" and not torch.version.hip:
        name, shared = _gpu(device.index)
        if shared >= SHARED or dispatch(_committed(), name, shape, tokens, plan):
            return chosen(name, shape, tokens, plan)
    return default_config(shape[3], plan, interpreted)


@functools.cache  # asked once, not at every launch
def _gpu(index: int | None) -> tuple[str, int]:
    """Name of that device, and bytes of shared memory that a block of it may ask for, 0 where torch does not say."""
    shared = getattr(torch.cuda.get_device_properties(index), "shared_memory_per_block_optin", 0)
    return torch.cuda.get_device_name(index), shared


@functools.cache
def _committed() -> Table:
    return read_table()


@functools.cache
def _say_once(gpu: str, shape: Shape) -> None:
    warnings.warn(
        f"kernels/dispatch.csv has no config for {gpu} and {shape} (hidden size, q heads, kv heads, head size): "
        "using what arithmetic suggests (kernels.dispatch.reasoned). `castpoint gpu` measures this GPU",
        stacklevel=4,
    )
