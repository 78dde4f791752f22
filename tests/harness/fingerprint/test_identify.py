"""The fingerprint: plans whose answer is known, kernels outside the family, and callables that do not behave."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import castpoint.harness.__main__ as cli
import castpoint.harness.fingerprint.rules as family
from castpoint.harness.fingerprint import probes, survey
from castpoint.harness.fingerprint.answer import UNEXPLAINED, Answer, unmet, words_of
from castpoint.harness.fingerprint.blackbox import KINDS, BlackBox
from castpoint.harness.fingerprint.chain import other_rows
from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.probes import EPS_LARGE, norm_rows
from castpoint.harness.fingerprint.rules import Rule, arithmetic, norm_rules, predict
from castpoint.kernels.checks import KEEP, RNE, RTZ
from castpoint.kernels.norm_qkv import norm_qkv
from castpoint.variants.catalogue import HF, ONE_ROUNDING, PLANS
from castpoint.variants.eager import eager_norm
from castpoint.variants.plan import CastPlan
from castpoint.variants.spec import round_to

ROOT = Path(__file__).parents[3]
Norm = Callable[[Tensor, Tensor, float], Tensor]
SPREAD = survey.norm_plans()[5::61]  # twelve; 61 shares no factor with 3, so that every word of every boundary occurs


def test_the_spread_has_every_word_of_every_boundary() -> None:
    for name, words in survey.expected(SPREAD[0], "rmsnorm").items():
        assert {survey.expected(plan, "rmsnorm")[name] for plan in SPREAD} == {
            survey.expected(plan, "rmsnorm")[name] for plan in survey.norm_plans()
        }, (name, words)


@pytest.mark.parametrize("plan", SPREAD, ids=lambda plan: "-".join(plan.roundings()) or "none")
def test_a_norm_is_named_by_its_spec_its_kernel_and_with_noise(plan: CastPlan) -> None:
    subjects = {
        "spec": ("rmsnorm", survey.spec_norm(plan)),
        "spec with noise": ("rmsnorm", survey.with_noise(survey.spec_norm(plan))),
        "triton": ("head_norm", survey.triton_head_norm(plan)),
    }
    for source, (kind, fn) in subjects.items():
        answer = identify(fn, kind)
        assert survey.right(answer, plan, kind, source), (source, answer)
        assert answer.share_equal > 1 - UNEXPLAINED > answer.runner_up_share_equal


@pytest.mark.parametrize("name", ["hf", "fp32", "cast-after-matmul", "deferred", "folded", "bf16-statistics", "gemma"])
def test_a_chain_is_named_by_its_spec(name: str) -> None:
    plan = PLANS[name].plan
    answer = identify(survey.chain(plan, "spec"), "qkv")
    assert survey.right(answer, plan, "qkv", "spec"), answer


@pytest.mark.parametrize("name", ["hf", "fp32-tf32x3"])
def test_a_chain_is_named_by_its_kernel(name: str) -> None:
    plan = PLANS[name].plan
    answer = identify(survey.chain(plan, "triton"), "qkv")
    assert survey.right(answer, plan, "qkv", "triton"), answer


def test_rules_differ_by_more_than_noise_and_the_threshold_hide() -> None:
    """Of the 486 roundings of a norm with bf16 outputs no two agree on the main rows to within noise."""
    rows = norm_rows(256, torch.Generator().manual_seed(0))
    calls = (rows, rows.at(EPS_LARGE))
    rules = [rule for rule in norm_rules(outs=(RNE, RTZ), roots=("rsqrt",)) if rule.eps == "float32"]
    assert len(rules) == 2 * 3**5
    stored = torch.stack([torch.cat([predict(rule, r).flatten() for r in calls]) for rule in rules]).bfloat16()
    bits = stored.view(torch.int16)[:, ::4]  # a quarter of the elements
    least = 1.0
    for i in range(0, len(rules), 12):
        differ = (bits != bits[i]).float().mean(1)
        differ[i] = 1
        least = min(least, differ.min().item())
    assert least > UNEXPLAINED + survey.NOISY, least


@pytest.mark.parametrize("rule", list(arithmetic(Rule())), ids=lambda rule: f"{rule.eps} {rule.root} {rule.order}")
def test_fp32_arithmetic_is_named(rule: Rule) -> None:
    """Every combination of eps, root and order, from the rule itself: one IEEE operation a step."""

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = family.Rows(x.float(), weight.float(), eps, x.shape[1])
        return predict(rule, rows).bfloat16()

    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified", answer
    assert {name: answer.candidates[0][name] for name in ("eps", "root", "order")} == {
        "eps": rule.eps, "root": rule.root, "order": rule.order}  # fmt: skip


@pytest.mark.parametrize("rule", list(arithmetic(Rule(rstd=RTZ, weight_offset=KEEP)))[:3], ids=lambda rule: rule.order)
def test_an_order_is_named_where_it_shows_in_one_product_of_thousands(rule: Rule) -> None:
    """Three factors of 8, 8 and 18 bits: fp32 rounds them once or twice, an ulp that bf16 hardly ever shows."""

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return predict(rule, family.Rows(x.float(), weight.float(), eps, x.shape[1])).bfloat16()

    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified" and answer.candidates[0]["order"] == rule.order, answer


@pytest.mark.parametrize("seed", [982451653, 1234567891])
def test_a_wrong_root_is_not_taken_for_another_eps(seed: int) -> None:
    """Every root an ulp off, up or down by a hash of it that treats all boundaries of bf16 alike. Where eps in float32
    and in float64 lead to different sides of a boundary, this kernel stores what eps in float64 would."""

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        bits = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).view(torch.int32)
        step = 2 * ((bits.long() * seed >> 13) % 2) - 1
        return (x.float() * (bits + step.int()).view(torch.float32).bfloat16().float() * weight.float()).bfloat16()

    answer = identify(fn, "rmsnorm")
    assert answer.status == "undecided" and "an fp32 ulp off" in answer.reason, answer
    assert {c["eps"] for c in answer.candidates} == {"float32", "float64"}
    assert all(c["rstd"] == RNE and c["normed"] == KEEP for c in answer.candidates)


# ---------------------------------------------------------------- outside the family


def norm_with(
    *,
    mean: Callable[[Tensor], Tensor] = lambda x: x.pow(2).mean(-1, keepdim=True),
    root: Callable[[Tensor, float], Tensor] = lambda v, eps: torch.rsqrt(v + eps),
    normed: Callable[[Tensor], Tensor] = lambda n: n,
    weight: Callable[[Tensor], Tensor] = lambda w: w,
    out: Callable[[Tensor], Tensor] = lambda y: y.bfloat16(),
) -> Norm:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        x = x.float()
        return out(normed(x * root(mean(x), eps)) * weight(w.float()))

    return fn


def bf16_sum(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[..., :1])
    for part in (x * x).split(1, dim=-1):
        total = (total + part).bfloat16().float()
    return total / x.shape[-1]


def one_column(n: Tensor) -> Tensor:
    rounded = n.bfloat16().float()
    rounded[..., -1] = n[..., -1]
    return rounded


OUTSIDERS: dict[str, Norm] = {
    "sum of squares accumulated in bf16": norm_with(mean=bf16_sum),
    "variance over D - 1": norm_with(mean=lambda x: x.pow(2).sum(-1, keepdim=True) / (x.shape[-1] - 1)),
    "eps outside the root": norm_with(root=lambda v, eps: 1 / (v.sqrt() + eps)),
    "eps a constant": norm_with(root=lambda v, eps: torch.rsqrt(v + 1e-6)),
    "normed in fp16": norm_with(normed=lambda n: n.half().float()),
    "1 + w in fp16": norm_with(weight=lambda w: (1 + w).half().float()),
    "normed cut to tf32": norm_with(normed=lambda n: (n.view(torch.int32) & -(1 << 13)).view(torch.float32)),
    "one column of normed not rounded": norm_with(normed=one_column),
    "rounded toward minus infinity": norm_with(
        out=lambda y: torch.where(
            y < 0, torch.nextafter(round_to(y, RTZ).bfloat16(), y.new_tensor(-1e30).bfloat16()), round_to(y, RTZ)
        ).bfloat16()
    ),
    "another function for few tokens": lambda x, w, eps: (
        eager_norm(x, w, eps, False) if len(x) > 16 else F.rms_norm(x, (x.shape[-1],), w, eps)
    ),
}


@pytest.mark.parametrize("name", OUTSIDERS)
def test_a_kernel_outside_the_family_is_none_of_these(name: str) -> None:
    answer = identify(OUTSIDERS[name], "rmsnorm")
    assert answer.status == "none" and answer.candidates == [], answer
    assert answer.nearest and answer.reason.startswith("none of these: the nearest plan leaves"), answer


def test_norms_that_no_one_plan_can_say_are_none_of_these() -> None:
    def gemma_heads(*args: object) -> tuple[Tensor, ...]:
        x, w_in, weight, q, k, eps, nq, nkv = args
        outputs = survey.chain(ONE_ROUNDING, "spec")(x, w_in, weight, q * 0 + 1, k * 0 + 1, eps, nq, nkv)
        return (outputs[0] * (1 + q), outputs[1] * (1 + k), outputs[2])

    answer = identify(gemma_heads, "qkv")
    assert answer.status == "none", answer


@pytest.mark.parametrize("residual", ["rounded", "kept"])
def test_a_fused_add_says_whether_the_sum_is_rounded(residual: str) -> None:
    def fn(x: Tensor, weight: Tensor, eps: float, residual_: Tensor | None = None, *, residual: Tensor) -> object:
        total = x.float() + residual.float()
        total = total.bfloat16().float() if rounded else total
        normed = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
        return (normed * weight.float()).bfloat16(), total.bfloat16()

    rounded = residual == "rounded"
    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified" and answer.candidates[0]["x"] == (RNE if rounded else "fp32"), answer


@pytest.mark.parametrize("where", ["before", "after", "ignored by q and k"])
def test_where_a_bias_is_added(where: str) -> None:
    def fn(x: Tensor, w: Tensor, weight: Tensor, q_w: Tensor, k_w: Tensor, eps: float, nq: int, nkv: int, bias: Tensor):
        hidden = eager_norm(x, w, eps, False).float()
        proj = (hidden.double() @ weight.double().T).float()
        b = bias.float().clone()
        if where.startswith("ignored"):
            b[: (nq + nkv) * len(q_w)] = 0
        proj = (proj.bfloat16() + b.bfloat16()) if where == "after" else (proj + b).bfloat16()
        q, k, v = proj.reshape(len(x), -1, len(q_w)).split([nq, nkv, nkv], dim=1)
        return eager_norm(q, q_w, eps, False), eager_norm(k, k_w, eps, False), v

    answer = identify(fn, "qkv")
    if where.startswith("ignored"):
        assert answer.status == "none" and "bias" in answer.reason
    else:
        assert answer.status == "identified" and answer.candidates[0]["bias"] == where, answer


# ---------------------------------------------------------------- the catalogue's names


@pytest.mark.parametrize("kind", ["rmsnorm", "qkv"])
def test_a_plan_has_the_words_that_the_survey_expects(kind: str) -> None:
    for name, named in PLANS.items():
        none = kind == "rmsnorm" and name in ("deferred", "folded")
        assert words_of(named.plan, kind) == ({} if none else survey.expected(named.plan, kind)), name


def test_an_answer_names_the_plans_that_have_its_words() -> None:
    norm, head = (identify(lambda x, w, eps: eager_norm(x, w, eps, False), kind) for kind in ("rmsnorm", "head_norm"))
    chain = identify(survey.chain(ONE_ROUNDING, "spec"), "qkv")
    assert "= the norm of hf" in summary(norm).splitlines()
    assert "= the head norm of hf, separate-head-norm" in summary(head).splitlines()
    assert chain.plans == ["one-rounding"] and "= one-rounding" in summary(chain).splitlines()
    unnamed = identify(survey.spec_norm(HF.replace(statistics=RTZ)), "rmsnorm")
    assert unnamed.status == "identified" and unnamed.plans == [] and "\n= " not in summary(unnamed)


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        ("hf", ""),
        ("one-rounding", "is not one-rounding: normed=bf16-rne against fp32"),
        ("one-roundin", "error: unknown plan 'one-roundin': did you mean 'one-rounding'? plans are hf, "),
        (
            "deferred",
            "error: deferred applies rstd after the matmul, so that it has no norm of its own: use --kind qkv",
        ),
    ],
)
def test_a_plan_is_expected(
    expected: str, line: str, module: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["castpoint", "identify", f"{module}:norm", "--kind", "rmsnorm", "--expect", expected]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as status:
        cli.main()
    printed = capfd.readouterr()
    error = [text for text in printed.err.splitlines() if text != "a kernel that talks"]
    assert status.value.code == bool(line) and len(error) == bool(line) and bool(printed.out) == (not line)
    assert not line or line in error[0], error


def test_an_error_is_no_plan(module: Path, run_identify: Ask) -> None:
    code, answer = run_identify(f"{module}:raises", "--expect", "hf")
    assert code == 1 and answer["status"] == "error"
    assert unmet(Answer("undecided", reason="between two"), "hf", "rmsnorm") == "undecided: between two"


def test_a_nearest_plan_that_explains_less_than_half_is_not_shown() -> None:
    far, near = (dataclasses.replace(Answer("none"), nearest={"rstd": KEEP}, share_equal=share) for share in (0.4, 0.6))
    assert "nearest" not in summary(far) and "nearest: rstd=fp32" in summary(near)


# ---------------------------------------------------------------- other shapes


def dispatching(other: Callable[[Tensor], bool]) -> Norm:
    """One rounding, or two where the shape is such."""

    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if other(x):
            return eager_norm(x, w, eps, False)
        return F.rms_norm(x, (x.shape[-1],), w, eps)

    return fn


DISPATCHES = {
    "wide": ("rmsnorm", lambda x: x.shape[1] > 1024, ["[1, 8192]", "[600, 2048]"]),
    "no power of two": ("rmsnorm", lambda x: x.shape[1] % 256, ["[3, 1000]"]),
    "many tokens": ("rmsnorm", lambda x: len(x) > 512, ["[600, 2048]"]),
    "one token": ("head_norm", lambda x: len(x) == 1 and x.shape[1] > 4, ["[1, 16, 256]"]),
    "many heads' rows": ("head_norm", lambda x: x.shape[0] > 512, ["[600, 1, 64]"]),
}


@pytest.mark.parametrize("name", DISPATCHES)
def test_another_function_at_another_shape_is_found(name: str) -> None:
    kind, other, shapes = DISPATCHES[name]
    answer = identify(dispatching(other), kind)
    assert answer.status == "none" and answer.candidates == [] and answer.nearest and not answer.plans, answer
    assert [part.split(" it is another function: ")[0] for part in answer.reason.split("; ")] == [
        f"at {shape}" for shape in shapes
    ], answer.reason
    assert identify(dispatching(lambda x: False), kind).status == "identified"


def test_one_row_of_many_that_differs_is_found() -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        y = F.rms_norm(x, (x.shape[-1],), w, eps)
        y[512:513] = eager_norm(x[512:513], w, eps, False)
        return y

    answer = identify(fn, "rmsnorm")
    assert answer.status == "none" and answer.reason.startswith("at [600, 2048] it is another function: 0."), answer


@pytest.mark.parametrize("where", ["many tokens", "wide", "wide heads"])
def test_another_chain_at_another_shape_is_found(where: str) -> None:
    plan = HF.replace(head_normed=KEEP) if where == "wide heads" else ONE_ROUNDING
    hf, other = survey.chain(HF, "eager"), survey.chain(plan, "eager")

    def fn(x: Tensor, *rest: object) -> tuple[Tensor, ...]:
        return (other if (len(x) > 512 if where == "many tokens" else x.shape[1] > 1024) else hf)(x, *rest)

    shape = "[600, 256]" if where == "many tokens" else "[1, 4096]"
    answer = identify(fn, "qkv")
    assert answer.status == "none" and answer.reason.startswith(f"at {shape} it is another function"), answer
    assert shape in summary(answer)


def test_a_shape_that_is_refused_is_left_out_and_one_that_breaks_is_an_error() -> None:
    def fn(x: Tensor, w: Tensor, eps: float) -> Tensor:
        if x.shape[1] % 256:
            raise RuntimeError("the width must be divisible by 256")
        return F.rms_norm(x, (x.shape[-1],), w, eps)

    answer = identify(fn, "rmsnorm")
    assert answer.status == "identified", answer
    assert answer.shapes == [[64, 256], [4, 256], [1, 8192], [600, 2048]] and "[3, 1000]" not in summary(answer)
    answer = identify(lambda x, w, eps: F.rms_norm(x, (x.shape[-1],), w, eps)[:512], "rmsnorm")
    assert answer.status == "error" and answer.reason == (
        "at [600, 2048]: the callable returned shape [512, 2048], expected [600, 2048]"
    )


@pytest.mark.parametrize("plan", survey.norm_plans()[3::97], ids=lambda plan: "-".join(plan.roundings()) or "none")
def test_other_rows_have_sums_that_are_exact_in_any_order(plan: CastPlan) -> None:
    rule = Rule(statistics=plan.statistics, variance=plan.variance, rstd=plan.rstd, normed=plan.normed)
    for width, residual in ((8192, False), (1000, False), (4096, False), (2048, True)):
        rows = other_rows(rule, 3, width, residual=residual)
        x = rows.x if rows.residual is None else rows.x + rows.residual
        squares = round_to(x * x, rule.statistics)
        exact = squares.double().sum(-1)
        for order in (squares, squares.flip(-1), squares.sort(-1).values):
            assert torch.equal(order.cumsum(-1)[:, -1].double(), exact)
            assert torch.equal(order.unfold(-1, 8, 8).sum(-1).sum(-1).double() if width % 8 == 0 else exact, exact)


def test_other_rows_are_those_that_an_approximate_root_does_not_change() -> None:
    """Of 32768 rows about ten lie that near to a boundary of rstd's rounding, and other rows take their place."""
    for rule in (Rule(rstd=RNE), Rule(variance=RTZ)):
        rows = other_rows(rule, 1 << 15, 64)
        assert len(rows.x) == 1 << 15
        mean = family.mean_of_squares(rule.replace(variance=KEEP), rows)
        stored = family.factor_of(rule, rows)
        for off in (1 - 2.0**-22, 1 + 2.0**-22):
            variance = round_to((mean * off).float(), rule.variance).double()
            assert torch.equal(family.scalar(rule, variance, rows.eps), stored)


# ---------------------------------------------------------------- callables that do not behave

MODULE = """
import os, time, torch
def norm(x, weight, eps):
    print("a kernel that talks")
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).bfloat16()
def raises(x, weight, eps): raise RuntimeError("no kernel image\\nfor this device")
def shape(x, weight, eps): return norm(x, weight, eps)[:-1]
def dtype(x, weight, eps): return norm(x, weight, eps).half()
def nothing(x, weight, eps): return None
def writes(x, weight, eps): return norm(x.mul_(1.5), weight, eps)
def random(x, weight, eps): return norm(x, weight, eps) * (1 + (torch.rand(x.shape) < 0.01))
def nan(x, weight, eps): return norm(x, weight, eps) / 0.0
def exits(x, weight, eps): raise SystemExit(0)
def dies(x, weight, eps): os.kill(os.getpid(), 9)
def hangs(x, weight, eps): time.sleep(600)
def fused(x: torch.Tensor, residual: torch.Tensor, weight, eps): return norm(x, weight, eps)
number = 5
"""
VERDICTS = {
    "raises": "the callable raised RuntimeError: no kernel image for this device",
    "shape": "the callable returned shape [63, 256], expected [64, 256]",
    "dtype": "the callable returned torch.float16, expected torch.bfloat16 or torch.float32 throughout",
    "nothing": "the callable returned (NoneType), expected fn(x, weight, eps) -> y; x, y [T, D]",
    "writes": "the callable writes into its inputs: give it copies",
    "random": "the callable is not deterministic: two calls on equal inputs differ in",
    "nan": "the callable returned NaN or infinity for",
    "exits": "the callable raised SystemExit: 0",
    "dies": "the callable ended its process (SIGKILL)",
    "hangs": "no answer within 8 s: the callable hangs, or needs a longer --time-limit",
    "missing": "cannot be imported: AttributeError",
    "fused": "the callable takes (x, residual, weight, eps), it must take fn(x, weight, eps) -> y; x, y [T, D], "
    "residual by name: wrap it in one",
    "number": "is of type int, which cannot be called",
}


Ask = Callable[..., tuple[int, dict[str, object]]]


@pytest.fixture
def run_identify(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """The command in this process: the callable has one of its own. Exit status, and the line of JSON."""

    def ask(*arguments: str) -> tuple[int, dict[str, object]]:
        monkeypatch.setattr(sys, "argv", ["castpoint", "identify", *arguments, "--kind", "rmsnorm", "--json"])
        with pytest.raises(SystemExit) as status:
            cli.main()
        printed = capfd.readouterr()
        assert len(printed.out.splitlines()) == 1 and "Traceback" not in printed.err, printed.err
        return status.value.code, json.loads(printed.out)

    return ask


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "norms.py"
    path.write_text(MODULE)
    return path


@pytest.mark.parametrize("name", VERDICTS)
def test_what_a_callable_does_wrong_is_a_line_of_json(name: str, module: Path, run_identify: Ask) -> None:
    limit = ("--time-limit", "8") if name == "hangs" else ()
    code, answer = run_identify(f"{module}:{name}", *limit)
    assert code == 1 and answer["status"] == "error" and answer["candidates"] == []
    assert VERDICTS[name] in answer["reason"] and "\n" not in answer["reason"], answer["reason"]


def test_a_module_that_is_not_there(module: Path, run_identify: Ask) -> None:
    for target in ("no_such_module:fn", f"{module}x.py:fn", "without_a_colon"):
        code, answer = run_identify(target)
        assert code == 1 and answer["status"] == "error" and answer["reason"]


def test_the_json_of_an_answer(module: Path) -> None:
    """The command as a user starts it; the other tests call it."""
    start = time.monotonic()
    command = [sys.executable, "-m", "castpoint", "identify", f"{module}:norm", "--kind", "rmsnorm", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (line,) = result.stdout.splitlines()
    code, answer = result.returncode, json.loads(line)
    fields = "status candidates share_equal runner_up_share_equal nearest reason plans shapes seconds".split()
    assert code == 0 and list(answer) == fields and time.monotonic() - start < 30
    assert answer["status"] == "identified" and answer["candidates"][0]["normed"] == RNE and answer["seconds"] < 10
    assert survey.expected(HF, "rmsnorm").items() <= answer["candidates"][0].items()
    assert answer["plans"] == ["hf"] and answer["shapes"] == [[64, 256], [4, 256], [1, 8192], [3, 1000], [600, 2048]]


UNKNOWN = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * D + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + offs, y.to(tl.bfloat16))
def unknown(x, weight, eps):
    y = torch.empty_like(x)
    kernel[(len(x),)](x, y, x.shape[1], BLOCK=256)
    return y
def own(x, weight, eps): raise NotImplementedError("only for CUDA")
"""


def test_an_instruction_that_is_not_known_here_is_not_the_callables_fault(tmp_path: Path, run_identify: Ask) -> None:
    path = tmp_path / "unknown.py"
    path.write_text(UNKNOWN)
    code, answer = run_identify(f"{path}:unknown")
    assert code == 1 and answer["reason"].startswith("its Triton kernel cannot be run on a CPU: "), answer
    assert "tanh.approx.f32" in answer["reason"] and "\\n" not in answer["reason"]
    code, answer = run_identify(f"{path}:own")
    assert answer["reason"] == "the callable raised NotImplementedError: only for CUDA"


def test_flat_heads_are_viewed_by_head() -> None:
    def fn(*arguments: object) -> list[Tensor]:
        return [output.flatten(1) for output in survey.chain(HF, "eager")(*arguments)]

    assert identify(fn, "qkv").plans == ["hf"]
    answer = identify(lambda *arguments: [output[:, :-1] for output in fn(*arguments)], "qkv")
    assert answer.reason == "the callable returned shape [64, 255], expected [64, 2, 128]"


def test_a_chain_with_other_arguments_is_told_what_to_take() -> None:
    reason = identify(norm_qkv, "qkv").reason
    assert reason.startswith("the callable takes (x, norm_weight, qkv_weight, num_q_heads, num_kv_heads, q_norm_weight")
    assert f", ...), it must take {KINDS['qkv']}, residual and bias by name: wrap it in one" in reason

    def inside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise TypeError("unsupported operand")

    assert identify(inside, "rmsnorm").reason == "the callable raised TypeError: unsupported operand"


def test_a_callable_may_use_one_buffer_again_and_again() -> None:
    buffer = torch.empty(64, 256)

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = eager_norm(x, weight, eps, False).float()
        return buffer.copy_(y) if y.shape == buffer.shape else y

    assert identify(fn, "rmsnorm").status == "identified"


def test_two_identifications_agree_and_leave_the_random_state_alone(two_threads: None) -> None:
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    answers = [identify(survey.spec_norm(HF), "rmsnorm") for _ in range(2)]
    first, second = (dataclasses.replace(answer, seconds=0.0) for answer in answers)
    assert first == second and torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert min(answer.seconds for answer in answers) < 10


def test_kinds_and_callables_are_checked() -> None:
    with pytest.raises(ValueError, match="kind must be one of rmsnorm, head_norm, qkv"):
        BlackBox(lambda: None, "layernorm")
    with pytest.raises(ValueError, match="is not callable"):
        BlackBox(5, "rmsnorm")


# ---------------------------------------------------------------- planted faults of the fingerprint itself


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was searched and predicted without the fault is not remembered with it, nor the other way round."""
    probes.forget()
    yield
    monkeypatch.undo()
    probes.forget()


def test_a_wrong_prediction_would_be_noticed(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    """If the family rounded to nearest where it says truncated, a truncating kernel would be named otherwise."""
    plan = HF.replace(normed=RTZ)
    assert survey.right(identify(survey.spec_norm(plan), "rmsnorm"), plan, "rmsnorm", "spec")
    probes.forget()
    monkeypatch.setattr(family, "round_to", lambda v, s: round_to(v, RNE if s == RTZ else s))
    assert not survey.right(identify(survey.spec_norm(plan), "rmsnorm"), plan, "rmsnorm", "spec")


def test_inexact_rows_would_be_noticed(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    """With weights of one, no product with the weight is rounded: normed and hidden cannot be told apart."""
    monkeypatch.setattr(probes, "norm_weight", lambda width, rng: torch.ones(width))
    assert not survey.right(identify(survey.spec_norm(HF), "rmsnorm"), HF, "rmsnorm", "spec")


def test_what_is_remembered_is_what_was_searched() -> None:
    """An identification that finds its rows searched answers as the first, and leaves them as they were."""
    probes.forget()
    first = identify(survey.spec_norm(HF), "rmsnorm")
    rows, _ = probes.first_rows(probes.WIDTH, residual=False)
    before, hits = rows.x.clone(), probes.telling_rows.cache_info().hits
    again = identify(survey.spec_norm(HF), "rmsnorm")
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert probes.telling_rows.cache_info().hits > hits
    assert probes.first_rows(probes.WIDTH, residual=False)[0] is rows and torch.equal(rows.x, before)
