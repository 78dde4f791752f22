"""Records of a GPU run whose numbers are all invented.

No number below was measured. Tests write them into a temporary folder, and their run says `invented` for a GPU.
"""

from __future__ import annotations

from pathlib import Path

from castpoint.harness.problems import grid
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuPointRow, GpuSpeedRow, Kind

CHAIN, OWN_CHAIN = "P1 F.rms_norm | cuBLAS | head_norm kernel", "P1 own kernels | cuBLAS"
FUSED, SEPARATE = "split-k 16 x 128, 8 splits, 8 warps, 4 stages", "separate"
ENVIRONMENT = {
    "commit": "c0ffee",
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "gpu": {"name": "invented H200", "multiprocessors": 132, "l2_bytes": 60_000_000, "cuda": "13.0"},
}
LIMITS = {
    "copy_bytes_per_s": 4.2e12,
    "bf16_flops_per_s": 760e12,
    "reason": "",
    "read": {"bytes_per_s": 4.4e12, "seconds": 1e-6},
    "launch": {"graph_s": {1: 4e-6, 3: 5e-6, 30: 40e-6, 300: 391e-6}, "per_kernel_s": 1.3e-6, "per_replay_s": 1e-6},
}


def opened(folder: Path) -> Records:
    records = Records(folder, {"model": "qwen3-0.6b"}, ENVIRONMENT)
    records.note(command="gpu", limits=LIMITS)
    return records


def add(records: Records, point: tuple, arm: str, us: float | None, p1_us: float | None = None, **more: object) -> None:
    """A row of gpu_speed: p10 and p90 1 % beside the median, the speed-up p1_us / us, noise of 2 %."""
    model, tokens, regime = point
    starts = {"P1": Kind.CHAIN, "P2": Kind.COMPILED, "P4": Kind.MATMUL, "own loop": Kind.LOOP}
    kind = next((kind for start, kind in starts.items() if arm.startswith(start)), Kind.OWN)
    config = more.pop("config", FUSED if kind == Kind.OWN else "")
    row = {"kind": kind, "cold": regime != grid.HOT, "config": config, "kernel": config.split(" ")[0]}
    row |= {"prepass": "none" if config else "", "slowed_by": "none"}
    row |= {"noise_p10": 0.98, "noise_p90": 1.02, "sm_mhz": 1980.0, "watts": 500.0, "celsius": 50.0}
    if us is not None:
        row |= {"p10_us": 0.99 * us, "p50_us": us, "p90_us": 1.01 * us, "floor_us": us / 2, "roofline_share": 0.5}
        row |= {"tflops": 79.0}
    if us is not None and p1_us is not None:
        ratio = p1_us / us
        row |= {"p1": CHAIN, "speedup_p1_p10": 0.99 * ratio, "speedup_p1_p50": ratio, "speedup_p1_p90": 1.01 * ratio}
    records.add(GpuSpeedRow(model=model, tokens=tokens, regime=regime, arm=arm, **(row | more)))


SMALL, LARGE = "qwen3-0.6b", "qwen3-32b"
AT = {name: (SMALL, tokens, grid.COLD) for name, tokens in (("1", 1), ("16", 16), ("256", 256), ("4096", 4096))}


def invent_by_hand(folder: Path, upside_down: bool = False) -> Records:
    """Six points, each with something of its own; see the comments."""
    records = opened(folder)

    def chain(point: tuple, us: float, p4_us: float | None = None) -> None:
        add(records, point, CHAIN, us, us)
        add(records, point, OWN_CHAIN, 1.1 * us, us)
        if p4_us:
            add(records, point, "P4 cuBLASLt", 1.2 * p4_us)
            add(records, point, "P4 cuBLAS", p4_us)
        records.add(GpuPointRow(**dict(zip(("model", "tokens", "regime"), point, strict=True))))

    def own(point: tuple, arm: str, us: float, p1_us: float | None, **more: object) -> None:
        if upside_down and p1_us is not None:
            more["speedup_p1_p50"] = us / p1_us
        add(records, point, arm, us, p1_us, **more)

    chain(AT["1"], 6.0, 4.0)  # wins; folded is red; fp32 is in no group
    own(AT["1"], "one-rounding", 4.5, 6.0)
    own(AT["1"], "hf", 4.0, 6.0)  # 1.5
    own(AT["1"], "deferred", 3.75, 6.0)  # 1.6
    add(records, AT["1"], "folded", None, status="red", reason="not timed: 3 of 9 elements | differ")
    own(AT["1"], "fp32", 3.0, 6.0)  # the fastest, and no match for a bf16 matmul
    add(records, AT["1"], "P2 torch.compile", 7.5, 6.0)  # 0.8
    chain(AT["16"], 6.06, 5.0)  # noise, loss, win
    own(AT["16"], "hf", 6.0, 6.06)  # 1.01
    add(records, AT["16"], "one-rounding", 1.0, 6.06, status="red", reason="wrong")  # whatever its time says
    own(AT["16"], "deferred", 6.6, 6.06)  # 0.918
    own(AT["16"], "folded", 5.0, 6.06)  # 1.212
    for arm in (CHAIN, OWN_CHAIN):  # no P1
        add(records, AT["256"], arm, None, status="failed", reason="RuntimeError: no kernel")
    own(AT["256"], "hf", 9.0, None)
    records.add(GpuPointRow(model=SMALL, tokens=256, regime=grid.COLD))
    chain(AT["4096"], 60.0, 50.0)  # a loss of a plan that ran unfused; the dearest loss is deferred's
    own(AT["4096"], "one-rounding", 62.0, 60.0, config=SEPARATE)  # 0.968
    own(AT["4096"], "deferred", 80.0, 60.0)  # 0.75
    red = (LARGE, 1, grid.COLD)  # its P1 turned out to be impossible
    add(records, red, CHAIN, None, status="red", reason="6.00 TB/s of cold memory: H200 has 4.8")
    add(records, red, OWN_CHAIN, 33.0, 17.0)
    own(red, "hf", 30.0, 17.0)
    failed = {"status": "failed", "reason": "out of memory: 2 GiB"}
    records.add(GpuPointRow(model=LARGE, tokens=4096, regime=grid.COLD, **failed))
    add(records, (SMALL, 1, grid.HOT), CHAIN, 5.0, 5.0)
    add(records, (SMALL, 1, grid.HOT), "one-rounding", 4.0, 5.0)
    return records
