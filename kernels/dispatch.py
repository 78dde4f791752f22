"""Which config a launch takes: a table of measurements, and what happens where it says nothing.

dispatch.csv holds, for a GPU, a shape and a number of tokens, the config that was fastest with cold weights, a row for
each place where rstd may be applied (`scale`); `castpoint gpu --tune` writes it. Between two numbers of tokens the
row of the larger holds, beyond the largest that of the largest. Times are those without RoPE; launches with it take
the same config, whose registers and spills `castpoint audit --configs` shows with it too.

Without a row (another GPU, another shape, operands wider than bf16) the chain runs as `separate`, RMSNorm, cuBLAS
and head norm, where that expresses the plan, and else as the default config. The first such launch says so.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import warnings
from pathlib import Path

from .config import Config, default_config, unsupported
from .plan import CastPlan

TABLE = Path(__file__).parent / "dispatch.csv"
KEY = ("gpu", "hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "scale", "tokens")
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
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}: write it with `castpoint gpu --tune`")
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
    if not configs:
        return None
    config = configs[min((known for known in configs if known >= tokens), default=max(configs))]
    return None if unsupported(config, plan) else config


def fallback(head_dim: int, plan: CastPlan) -> Config:
    """What runs where the table says nothing: `separate` where it expresses the plan, else the default config."""
    separate = Config("separate")
    return default_config(head_dim, plan, False) if unsupported(separate, plan) else separate


def chosen(gpu: str, shape: Shape, tokens: int, plan: CastPlan) -> Config:
    """The config of a launch on the GPU of that name (torch.cuda.get_device_name): the table's, or the fallback,
    which is said once."""
    config = dispatch(_committed(), gpu, shape, tokens, plan)
    if config is not None:
        return config
    if plan.matmul == "bf16":  # wider operands have no rows by design
        _say_once(gpu, shape)
    return fallback(shape[3], plan)


@functools.cache
def _committed() -> Table:
    return read_table()


@functools.cache
def _say_once(gpu: str, shape: Shape) -> None:
    warnings.warn(
        f"kernels/dispatch.csv has no config for {gpu} and {shape} (hidden size, q heads, kv heads, head size): "
        "using cuBLAS and separate norms. `castpoint gpu --tune` measures this GPU",
        stacklevel=4,
    )
