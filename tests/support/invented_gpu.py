"""Records of a GPU run whose numbers are all invented.

No number below was measured. Tests write them into a temporary folder, and their run says `invented` for a GPU.
"""

from __future__ import annotations

from pathlib import Path

from castpoint.harness.problems import grid
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import GpuLimitRow, GpuSpeedRow, GpuStepRow, TuningRow
from castpoint.harness.runs.words import Kind, Step

CHAIN, OWN_CHAIN = "P1 F.rms_norm | cuBLAS | head_norm kernel", "P1 own kernels | cuBLAS"
P4_BEST = "P4 cuBLAS"
FUSED, SEPARATE = "split-k 16 x 128, 8 splits, 8 warps, 4 stages", "separate"
ENVIRONMENT = {
    "device": "cuda",
    "commit": "c0ffee",
    "sources": "5e5e5e5e5e5e",
    "versions": {"torch": "2.13.0", "triton": "3.9.0"},
    "gpu": {"name": "invented H200", "multiprocessors": 132, "l2_bytes": 60_000_000, "cuda": "13.0"},
}
LIMITS = {
    "copy": (4.2e12, "B/s"),
    "read": (4.4e12, "B/s"),
    "bf16 matmul": (760e12, "FLOP/s"),
    "an empty kernel in a graph": (1.3e-6, "s"),
    "replaying a graph": (1e-6, "s"),
}


def opened(folder: Path, limits: bool = True) -> Records:
    records = Records(folder, {"command": "gpu"}, ENVIRONMENT)
    records.note(command="gpu", narrowed_by={})
    for name, (value, unit) in LIMITS.items() if limits else ():
        records.add(GpuLimitRow(limit=name, value=value, unit=unit))
    return records


def add(
    records: Records, point: tuple, arm: str, us: float | None, p1_us: float | None = None,
    p4_us: float | None = None, step: Step = Step.CHAINS, **more: object,
) -> None:  # fmt: skip
    """A row of gpu_speed: p10 and p90 1 % beside the median, the speed-up p1_us / us, us / p4_us, noise of 2 %."""
    model, tokens, regime = point
    starts = {"P1": Kind.CHAIN, "P2": Kind.COMPILED, "P4": Kind.MATMUL, "own loop": Kind.LOOP}
    kind = next((kind for start, kind in starts.items() if arm.startswith(start)), Kind.OWN)
    config = more.pop("config", FUSED if kind == Kind.OWN else "")
    row = {"kind": kind, "cold": regime != grid.HOT, "config": config, "kernel": config.split(" ")[0]}
    row |= {"function": arm.split(",")[0] if kind == Kind.OWN else "one-rounding"}
    row |= {"prepass": "none" if config else "", "slowed_by": "none"}
    row |= {"noise_p10": 0.98, "noise_p90": 1.02, "sm_mhz": 1980.0, "watts": 500.0, "celsius": 50.0}
    if us is not None:
        row |= {"p10_us": 0.99 * us, "p50_us": us, "p90_us": 1.01 * us, "floor_us": us / 2, "roofline_share": 0.5}
        row |= {"tflops": 79.0}
    for name, over, ratio in (
        ("speedup_p1", "p1", p1_us and us and p1_us / us),
        ("over_p4", "p4", p4_us and us and us / p4_us),
    ):
        if ratio:
            row |= {over: CHAIN if over == "p1" else P4_BEST}
            row |= {f"{name}_p10": 0.99 * ratio, f"{name}_p50": ratio, f"{name}_p90": 1.01 * ratio}
    records.add(GpuSpeedRow(model=model, tokens=tokens, regime=regime, step=step, arm=arm, **(row | more)))


def end(records: Records, step: Step, point: tuple = ("", 0, ""), **more: object) -> None:
    """A step's row: its other rows are complete."""
    model, tokens, regime = point
    records.add(GpuStepRow(step=step, model=model, tokens=tokens, regime=regime, seconds=1.0, **more))


SMALL, LARGE = "qwen3-0.6b", "qwen3-32b"
AT = {name: (SMALL, tokens, grid.COLD) for name, tokens in (("1", 1), ("16", 16), ("256", 256), ("4096", 4096))}


def invent_by_hand(folder: Path, upside_down: bool = False) -> Records:
    """Six points, each with something of its own; see the comments."""
    records = opened(folder)
    end(records, Step.LIMITS)

    def chain(point: tuple, us: float, p4_us: float | None = None) -> None:
        add(records, point, CHAIN, us, us)
        add(records, point, OWN_CHAIN, 1.1 * us, us)
        if p4_us:
            add(records, point, "P4 cuBLASLt", 1.2 * p4_us)
            add(records, point, P4_BEST, p4_us)
        end(records, Step.CHAINS, point)

    def own(point: tuple, arm: str, us: float, p1_us: float | None, p4_us: float | None = None, **more: object) -> None:
        if upside_down and p1_us is not None:
            more["speedup_p1_p50"] = us / p1_us
        add(records, point, arm, us, p1_us, p4_us, **more)

    chain(AT["1"], 6.0, 4.0)  # wins; folded is red; fp32 is in no group
    own(AT["1"], "one-rounding", 4.5, 6.0, 4.0)
    own(AT["1"], "hf, fused", 4.0, 6.0, 4.0)  # 1.5; the arm's name is no plan's
    own(AT["1"], "deferred", 3.75, 6.0, 4.0)  # 1.6
    add(records, AT["1"], "folded", None, status="red", reason="not timed: 3 of 9 elements | differ")
    own(AT["1"], "fp32", 3.0, 6.0)  # the fastest, and no match for a bf16 matmul
    add(records, AT["1"], CHAIN, 6.6, 6.6, step=Step.COMPILED)  # slower by the clock of another minute
    add(records, AT["1"], "P2 torch.compile", 8.25, 6.6, step=Step.COMPILED)  # 0.8
    chain(AT["16"], 6.06, 5.0)  # noise, loss, win
    own(AT["16"], "hf", 6.0, 6.06, 5.0)  # 1.01
    add(records, AT["16"], "one-rounding", 1.0, 6.06, status="red", reason="wrong")  # whatever its time says
    own(AT["16"], "deferred", 6.6, 6.06)  # 0.918
    add(records, AT["16"], CHAIN, 7.0, 7.0, step=Step.PLANS)
    own(AT["16"], "hf", 6.2, 7.0, step=Step.PLANS)  # 1.129 by a slower minute, and not its fastest row
    own(AT["16"], "folded", 5.0, 6.06)  # 1.212
    for arm in (CHAIN, OWN_CHAIN):  # no P1
        add(records, AT["256"], arm, None, status="failed", reason="RuntimeError: no kernel")
    own(AT["256"], "hf", 9.0, None)
    end(records, Step.CHAINS, AT["256"])
    chain(AT["4096"], 60.0, 50.0)  # a loss of a plan that ran unfused; the dearest loss is deferred's
    own(AT["4096"], "one-rounding", 62.0, 60.0, config=SEPARATE)  # 0.968
    own(AT["4096"], "deferred", 80.0, 60.0)  # 0.75
    red = (LARGE, 1, grid.COLD)  # its P1 turned out to be impossible
    add(records, red, CHAIN, None, status="red", reason="6.00 TB/s of cold memory: H200 has 4.8")
    add(records, red, OWN_CHAIN, 33.0, 17.0)
    own(red, "hf", 30.0, 17.0)
    for step in (Step.CHAINS, Step.COMPILED):
        end(records, step, (LARGE, 4096, grid.COLD), status="failed", reason="out of memory: 2 GiB")
    add(records, (SMALL, 1, grid.HOT), CHAIN, 5.0, 5.0)
    add(records, (SMALL, 1, grid.HOT), "one-rounding", 4.0, 5.0)
    return records


def invent_points(records: Records, points: list[tuple]) -> Records:
    """The step `chains` at those points, as shapes of curves alone: gains that shrink with tokens."""
    for point in points:
        p4 = 3.0 + 0.02 * point[1]
        p1 = p4 + 3.0
        add(records, point, CHAIN, p1, p1, p4)
        add(records, point, P4_BEST, p4, None, p4)
        for place, plan in enumerate(("one-rounding", "deferred", "folded")):
            us = 1.25 * p4 + 0.2 * place
            add(records, point, plan, us, p1, p4)
        end(records, Step.CHAINS, point)
    return records


def invent_cut_off(folder: Path, points: list[tuple] | None = None) -> Records:
    """A run that ended without a word: by default behind four points of one model, in the middle of a fifth."""
    records = invent_points(opened(folder), list(AT.values()) if points is None else points)
    if points is None:
        add(records, (LARGE, 1, grid.COLD), CHAIN, 17.0, 17.0)
    return records


def invent_tuning(records: Records) -> Records:
    """Rows of tuning at one point: a fused config twice as fast as `separate`."""
    sizes = {"block_m": 16, "block_k": 128, "num_warps": 8, "num_stages": 4, "splits": 8, "cold": True}
    for config, kernel, us in ((FUSED, "split-k", 3.0), (SEPARATE, "separate", 6.0)):
        row = {"model": SMALL, "tokens": 1, "scale": "prologue", "config": config, "kernel": kernel, "prepass": "none"}
        row |= {"p50_us": us, "speedup_separate": 6.0 / us, "noise_p10": 0.98, "noise_p90": 1.02}
        records.add(TuningRow(**row, **sizes))
    return records
