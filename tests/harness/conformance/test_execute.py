"""Triton kernels compiled for a GPU that is not here, run on the CPU: ours equal their specs, and what is wrong shows.

They compile and run in processes of their own, since kernels are interpreted in this one.
"""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from audit_support import in_process

import castpoint.harness.__main__ as cli
from castpoint.harness.conformance import cuda, execute
from castpoint.harness.report.studies import executed_table, executed_words
from castpoint.harness.runs.frames import latest
from castpoint.harness.runs.records import Records
from castpoint.harness.runs.schema import ExecutedRow
from castpoint.harness.runs.words import Check
from castpoint.kernels.config import Config
from castpoint.variants.catalogue import PLANS
from castpoint.variants.spec import spec

ROOT = Path(__file__).parents[3]
TILES = (
    Config("fused", "hidden", 128, 64, 8, 3),
    Config("fused", "rstd", 64, 64, 4, 3),
    Config("split-k", "none", 16, 128, 8, 4, 4),
    Config("split-k", "rstd", 64, 64, 8, 4, 2),
    Config("split-k", "hidden", 64, 64, 4, 4, 3),
)


# ---------------------------------------------------------------- our own kernels


def of_every_plan(target: str, *names: str) -> Iterator[dict]:
    for name, products in itertools.product(names or PLANS, ("one", "many")):
        yield row_of(target, name, products=products)


def of_tiles(target: str) -> Iterator[dict]:
    for name in ("one-rounding", "deferred"):
        for config in TILES:
            tokens = 1 if config.block_m == 16 else 70
            yield row_of(target, name, config, tokens=tokens, products="many", hidden_size=1008)
    yield row_of(target, "one-rounding", Config("separate"), products="many")


def of_inputs(target: str) -> Iterator[dict]:
    for name in ("hf", "truncating", "fp32"):
        yield row_of(target, name, rope=True)
    yield row_of(target, "deferred", TILES[2], rope=True)
    yield row_of(target, "hf", Config("separate"), rope=True)
    yield row_of(target, "hf", head_norm=False, head_dim=64)
    yield row_of(target, "deferred", head_dim=256)
    yield row_of(target, "hf", separate_head_norm=True)
    yield row_of(target, "hf", products="many", bias=True, residual=True)


def of_blocks(target: str) -> Iterator[dict]:
    """Weights in blocks: a plan of each place of rstd and each way to hold a weight, many tokens and one."""
    from castpoint.harness.problems.quantised import exact_quantised
    from castpoint.harness.ptx.driver import executed
    from castpoint.variants.quantised import run_quantised

    asked = [("hf", "q4_0", "bf16-rne", None), ("deferred", "q8_0", "bf16-rne", execute.FEW)]
    asked += [("fp32", "q8_0", "fp32", None), ("truncating", "q4_0", "bf16-rtz", execute.FEW)]
    for (name, format, weight, config), products in itertools.product(asked, ("one", "many")):
        plan, tokens = PLANS[name].plan, 1 if config else 70
        shape = {"tokens": tokens, "hidden_size": 224, "head_dim": 128, "num_q_heads": 2, "num_kv_heads": 1}
        problem = exact_quantised(plan, format, weight, products=products, **shape)
        with executed(target):
            outputs = run_quantised(plan, problem, config=config)
        expected = spec(plan, problem).outputs().values()
        equal = [(a.double() == b).double().mean().item() for a, b in zip(outputs, expected, strict=True)]
        yield {"plan": name, "format": format, "equal": equal}


def of_the_rig(target: str) -> Iterator[dict]:
    """The kernels that stand beside ours in `make gpu`: the loop by itself, a stream that only reads, an empty one."""
    import torch

    from castpoint.harness.conformance.cuda import loop_checked
    from castpoint.harness.conformance.execute import HERE
    from castpoint.harness.ptx.driver import executed
    from castpoint.harness.timing.limits import empty_kernel, read_sums

    weight = torch.arange(7 * 1026).reshape(7, 1026).to(torch.bfloat16)
    with executed(target):
        empty_kernel[(1,)]()
        found = loop_checked(TILES[0], Check.EXACT, HERE)
        sums = read_sums(weight, 2048)
    expected = [int(part.long().sum()) for part in weight.view(torch.int32).reshape(-1).split(2048)]
    yield {"equal": [float((int(sum_) - wanted) % (1 << 32) == 0) for sum_, wanted in zip(sums, expected, strict=True)]}
    yield {"equal": [found["share_equal"]] * 3, **found}


def with_faults(target: str, *faults: str) -> Iterator[dict]:
    """Rows of hf, each with its PTX changed: a fault is `old -> new`, wherever the old text stands."""
    import castpoint.harness.ptx.driver as driver
    from castpoint.kernels.norm_qkv import norm_qkv_kernel

    parse = driver.parse
    for fault in faults:
        old, new = fault.split(" -> ")

        def changed(text: str, old: str = old, new: str = new) -> object:
            assert old in text, old
            return parse(text.replace(old, new))

        driver.parse = changed
        norm_qkv_kernel.device_caches.clear()  # so that the next launch reads its PTX again
        try:
            yield {**row_of(target, "hf"), "fault": fault, "reason": ""}
        except IndexError as error:
            yield {"equal": [0.0], "fault": fault, "reason": str(error)}


def about_targets() -> Iterator[dict]:
    """One process, two targets: what each compiled for, a tile that only the larger one holds, what is active after."""
    from triton.runtime import driver as active
    from triton.runtime.errors import OutOfResources

    import castpoint.harness.ptx.driver as driver

    before, parse, seen = active._active, driver.parse, []
    driver.parse = lambda text: seen.append(re.search(r"[.]target (\w+)", text)[1]) or parse(text)
    row_of("sm_90", "hf"), row_of("sm_80", "hf")
    yield {"compiled for": seen}
    for target, stages in (("sm_90", 3), ("sm_80", 4)):  # 192 KiB each
        try:
            yield row_of(target, "hf", Config("fused", "hidden", 128, 128, 8, stages))
        except OutOfResources as error:
            yield {"equal": str(error)}
    yield {"restored": active._active is before}


def row_of(target: str, name: str, config: Config | None = None, **inputs: object) -> dict:
    """Share of q's, k's and v's elements that equal the spec's."""
    from castpoint.harness.problems.exact import exact_problem
    from castpoint.harness.ptx.driver import executed
    from castpoint.variants.backends import run_triton
    from castpoint.variants.spec import spec

    separate = inputs.pop("separate_head_norm", False)
    plan = PLANS[name].plan
    problem = exact_problem(plan, **{"tokens": 70, "head_dim": 128, **inputs})
    with executed(target):
        outputs = run_triton(plan, problem, config=config, separate=separate)
    expected = spec(plan, problem).outputs()
    equal = [
        (output.double() == expected[key]).double().mean().item() for key, output in zip("qkv", outputs, strict=True)
    ]
    return {"plan": name, "config": str(config), "inputs": str(inputs), "equal": equal}


@pytest.mark.parametrize(
    ("function", "arguments", "count"),
    [
        (of_every_plan, ["sm_90"], 2 * len(PLANS)),
        (of_every_plan, ["sm_80", "hf", "deferred", "fp32-tf32x3", "truncating"], 8),
        (of_tiles, ["sm_90"], 11),
        (of_inputs, ["sm_90"], 9),
        (of_the_rig, ["sm_90"], 2),
        (of_blocks, ["sm_90"], 8),
        (of_blocks, ["sm_80"], 8),
    ],
    ids=["plans", "plans on sm_80", "tiles", "inputs", "rig", "blocks", "blocks on sm_80"],
)
def test_compiled_kernels_equal_their_spec(function, arguments: list[str], count: int, tmp_path: Path):
    rows = in_process(function, *arguments, cache=tmp_path)
    assert len(rows) == count
    for row in rows:
        assert len(row["equal"]) >= 2 and set(row["equal"]) == {1.0}, row


def test_targets_do_not_mix(tmp_path: Path):
    compiled, larger, smaller, after = in_process(about_targets, cache=tmp_path)
    assert compiled == {"compiled for": ["sm_90a", "sm_80"]} and after == {"restored": True}
    assert larger["equal"] == [1.0, 1.0, 1.0] and "Hardware limit: 166912" in smaller["equal"]


def test_a_fault_in_the_compiled_code_shows(tmp_path: Path):
    faults = (
        ", 1, 1, 0; -> , 1, 1, 0; //",  # of a product, and none: a comment
        ", 32767; -> , 32766;",  # of the rounding to nearest even
        "sqrt.rn.f32 -> abs.f32",
        ", 1, 31, -1; -> , 2, 31, -1;",  # a step of a sum over threads
        "setp.lt.s64 -> setp.le.s64",  # a mask: a row more than there is
    )
    right, *wrong, beyond = in_process(with_faults, "sm_90", *faults, cache=tmp_path)
    assert right["equal"] == [1.0, 1.0, 1.0]
    assert len(wrong) == 3 and all(min(row["equal"]) < 1.0 for row in wrong), wrong
    assert "beyond the tensors" in beyond["reason"] and "in norm_qkv_kernel: " in beyond["reason"]


# ---------------------------------------------------------------- callables of others

FOREIGN = """
import torch, triton, triton.language as tl

@triton.jit
def kernel(x_ptr, w_ptr, y_ptr, D, eps, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * D + offs, mask=offs < D, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + offs, mask=offs < D, other=0.0)
    normed = x * tl.rsqrt(tl.sum(x * x) / D + eps)
    y = normed.to(tl.bfloat16) * w if TWICE else normed * w
    tl.store(y_ptr + row * D + offs, y.to(tl.bfloat16), mask=offs < D)

def norm(x, weight, eps, twice):
    x = x.contiguous()
    y = torch.empty_like(x)
    kernel[(x.shape[0],)](x, weight, y, x.shape[1], eps, TWICE=twice, BLOCK=triton.next_power_of_2(x.shape[1]))
    return y

def twice(x, weight, eps):
    return norm(x, weight, eps, True)

def once(x, weight, eps):
    return norm(x, weight, eps, False)

def beyond(x, weight, eps):
    y = torch.empty_like(x)
    kernel[(x.shape[0] + 1,)](x, weight, y, x.shape[1], eps, TWICE=True, BLOCK=triton.next_power_of_2(x.shape[1]))
    return y
"""


def identified(tmp_path: Path, name: str, before: str = "") -> dict:
    path = tmp_path / "foreign.py"
    path.write_text(before + FOREIGN)
    command = [sys.executable, "-m", "castpoint", "identify", f"{path}:{name}", "--kind", "rmsnorm", "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout)


@pytest.mark.parametrize(("name", "normed"), [("twice", "bf16-rne"), ("once", "fp32")])
def test_a_triton_kernel_is_identified_without_a_gpu(tmp_path: Path, name: str, normed: str):
    """Triton's interpreter would truncate its casts to bf16."""
    answer = identified(tmp_path, name)
    assert answer["status"] == "identified"
    (words,) = answer["candidates"]
    assert (words["normed"], words["hidden"], words["statistics"]) == (normed, "bf16-rne", "fp32")


def test_a_module_that_asks_for_the_driver_is_imported(tmp_path: Path):
    asks = "import triton\nDEVICE = triton.runtime.driver.active.get_active_torch_device()\n"
    assert identified(tmp_path, "once", asks)["status"] == "identified"
    broken = identified(tmp_path, "once", "import triton.no_such_module\n")
    assert broken["status"] == "error" and "no_such_module" in broken["reason"]


def test_a_kernel_that_reads_beyond_its_tensors_is_caught(tmp_path: Path):
    answer = identified(tmp_path, "beyond")
    assert answer["status"] == "error" and "reach beyond the tensors that the kernel was given" in answer["reason"]
    assert "ld.global" in answer["reason"] and "\n" not in answer["reason"]


# ---------------------------------------------------------------- the command


def test_another_target_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="target must be sm_80 or sm_90, not 'sm_100'"):
        cli.audit(run=True, target="sm_100", results=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def records(tmp_path: Path) -> Path:
    found = Records(tmp_path, {"command": "execute"}, {"commit": "abc"})
    key = {"target": "sm_90", "plan": "hf", "tokens": 70}
    found.add(ExecutedRow(**key, config="default", check=Check.EXACT, share_equal=1.0, elements=2000))
    found.add(ExecutedRow(**key, config="default", check=Check.ENVELOPE, share_equal=0.999, elements=1000))
    red = {"share_equal": 0.9, "elements": 70, "status": "red", "reason": "7 differ"}
    found.add(ExecutedRow(**key, config="separate", check=Check.EXACT, **red))
    found.finish()
    return tmp_path


def test_records_of_what_was_run(records: Path):
    frame = latest(records, "executed")[1]
    (row,) = executed_table(frame).to_dict("records")
    assert row == {
        "target": "sm_90", "plan": "hf", "kernels": 2, "checks": 3, "ok": 2, "elements, exact inputs": 2070,
        "least share equal to the spec there": 0.9, "elements, drawn inputs": 1000,
    }  # fmt: skip
    assert executed_words(frame) == (
        "2 kernels. Exact inputs, 2 kernels: 2,063 of 2,070 elements equal their spec in every bit, half of these "
        "elements with one product a dot product, half with many. Drawn inputs, 1 kernels: 1,000 elements, all inside "
        "their envelope in 1 kernels."
    )


def test_every_kernel_has_exact_and_drawn_inputs():
    checks = dict.fromkeys([*execute.kernel_checks(), *execute.tile_checks()])  # a launch may take a tile of tuning
    by_kernel: dict[tuple, list] = {}
    for name, config, check, rope, tokens in checks:
        by_kernel.setdefault((name, config, rope, tokens), []).append(check)
    assert all(sorted(found) == sorted(cuda.AGAINST_SPEC) for found in by_kernel.values()) and len(by_kernel) > 90


def test_weights_in_blocks_have_exact_and_drawn_inputs():
    checks = list(execute.block_checks())
    assert len(checks) == 32 and {format for _, format, *_ in checks} == {"q4_0", "q8_0"}
    for check in cuda.AGAINST_SPEC:
        assert sum(each[-1] == check for each in checks) == 16
    problems = execute.block_problems(PLANS["hf"].plan, "q4_0", "bf16-rne", Check.EXACT, 1)
    assert [p.x.shape for p in problems] == [(1, 480)] * 2 and 480 % 64 and 480 % 128


def test_what_a_check_asks_ends_in_part_tiles():
    """Of tokens and of D; many products and one; drawn heads are the layer's first."""
    exact, drawn = (execute.wanted_of("hf", check, False, 70) for check in cuda.AGAINST_SPEC)
    assert [p.weights for p in exact.problems] == ["exact, one", "exact, many"]
    assert [p.x.shape for p in exact.problems] == [(70, 1008)] * 2 and 1008 % 16 == 0 and 1008 % 64 and 1008 % 128
    (few,), (whole,) = drawn.problems, cuda.problems_for(PLANS["hf"].plan, Check.ENVELOPE, "cpu")
    assert few.num_heads == 8 == exact.problems[0].num_heads
    chain, every = spec(PLANS["hf"].plan, few), spec(PLANS["hf"].plan, whole)
    assert torch.equal(chain.q, every.q[:, :4]) and torch.equal(chain.k, every.k[:, :2])
    assert torch.equal(chain.v, every.v[:, :2])
