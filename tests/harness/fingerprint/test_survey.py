"""Each adapter computes what its row says: equal bits with a formula written here, on inputs whose sums are exact.

Adapters of optional packages that are not installed have no tests here, by name; what needs a GPU is held to its
arguments alone.
"""

import functools
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from support import assert_bit_equal
from torch import Tensor

from castpoint.harness.peers import packages
from castpoint.harness.peers import running as subject
from castpoint.harness.peers.packages import package_rows
from castpoint.harness.peers.running import COMPILE, EAGER, JIT, OP_BY_OP, TRITON, Implementation, Norm
from castpoint.harness.problems.exact import exact_problem
from castpoint.harness.runs.environment import version
from castpoint.kernels.plan import KEEP, RNE
from castpoint.variants.catalogue import plan_named
from castpoint.variants.problem import Problem
from castpoint.variants.spec import spec, store

OPTIONAL = {"liger-kernel": "liger_kernel", "fla-core": "fla", "flax": "flax", "jax": "jax"}
# A second to compile each graph, so of those that differ by the class alone one is enough.
COMPILED = ("F.rms_norm", "Qwen3RMSNorm", "Gemma3RMSNorm", "Gemma4RMSNorm", "nano-vLLM's formula")


def row_id(row: Implementation) -> str:
    return f"{row.name}, {row.kind}, {row.how}"


ROWS = package_rows()
FORMULAS = {"bf16-statistics, eps=bf16, root=1/sqrt": "all in bf16", "one-rounding, order=x*(rstd*w)": "weight first"}
FORMULAS["one-rounding, order=x*(rstd*w), hidden=fp32"] = "weight first, fp32"
HERE = [
    row
    for row in ROWS
    if row.how != TRITON and version(row.package) and (row.how not in COMPILE or row.name in COMPILED)
    if not row.right.startswith("none")
]


# ---------------------------------------------------------------- formulas


def expected(problem: Problem, formula: str) -> Tensor:
    """The norm in float64, rounded where the formula says."""
    if formula.startswith("weight first"):
        rstd = spec(plan_named("fp32"), problem).rstd
        product = store(rstd * problem.norm_weight.double(), KEEP)
        return store(problem.x.double() * product, KEEP if formula.endswith("fp32") else RNE)
    if formula == "all in bf16":
        x, weight = problem.x.double(), problem.norm_weight.double()
        mean = store(store(x * x, RNE).mean(-1, keepdim=True), RNE)
        rstd = store(1 / store(store(mean + problem.eps, RNE).sqrt(), RNE), RNE)
        return store(store(x * rstd, RNE) * weight, RNE)
    return spec(plan_named(formula), problem).hidden


@functools.cache
def exact_inputs(formula: str, kind: str) -> tuple[Problem, ...]:
    """Problems with other eps and fewer tokens in turn. No sum in them depends on order, no rstd on how it is rounded.

    The second has x of 2^-9, where eps 1e-6 is a fourth of the variance: an eps that has no effect shows.
    """
    plan = plan_named("gemma" if formula == "gemma" else "one-rounding")
    width = 128 if kind == "head_norm" else 256
    problem = exact_problem(plan, hidden_size=width)
    small = problem.replace(x=problem.x * 2.0**-9)
    tokens = problem.tokens if kind == "rmsnorm" else 12
    others = [with_robust_rstd(small, 1e-6), with_robust_rstd(small, 1e-5)]
    return tuple(p.replace(x=p.x[:t]) for p, t in zip([problem, *others], (tokens, tokens, 3), strict=True))


def with_robust_rstd(problem: Problem, eps: float) -> Problem:
    """The problem with the next larger eps for which rstd in fp32 is the correctly rounded one."""
    for _ in range(200):
        problem = problem.replace(eps=eps)
        chain = spec(plan_named("gemma" if problem.weight_offset else "one-rounding"), problem)
        root = (chain.variance.float() + eps).double().sqrt().float()
        if torch.equal((1 / root).double(), chain.rstd):
            return problem
        eps *= 1.02
    raise AssertionError("no eps found")


def assert_is(norm: Norm, formula: str, kind: str = "rmsnorm") -> None:
    """Fails unless the norm equals the formula in every bit, and leaves its inputs as they were."""
    for problem in exact_inputs(formula, kind):
        x = problem.x if kind == "rmsnorm" else problem.x.unflatten(0, (-1, 3))
        given, weight = x.clone(), problem.norm_weight.clone()
        y = norm(given, weight, problem.eps)
        wanted = expected(problem, formula).reshape(x.shape)
        assert y.dtype == (torch.float32 if formula.endswith("fp32") else torch.bfloat16) and y.device == x.device
        assert_bit_equal(actual=y, expected=wanted, what=f"eps {problem.eps:.3g}:")
        assert_bit_equal(actual=given, expected=x, what="x after the call:")
        assert_bit_equal(actual=weight, expected=problem.norm_weight, what="weight after the call:")


@pytest.mark.parametrize("row", HERE, ids=row_id)
def test_adapter_is_its_formula(row: Implementation) -> None:
    assert_is(row.make("cpu"), FORMULAS.get(row.right, row.right), row.kind)


# ---------------------------------------------------------------- the check notices faults


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, inner: bool = True) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return ((weight.float() + offset) * (normed.bfloat16().float() if inner else normed)).bfloat16()


def rstd_rounded(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).bfloat16()
    return (weight.float() * (x.float() * rstd.float()).bfloat16().float()).bfloat16()


def writes_into_x(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    y = rms_norm(x, weight, eps)
    x.mul_(2)
    return y


FAULTS = {
    "no inner rounding": functools.partial(rms_norm, inner=False),
    "1 + w": functools.partial(rms_norm, offset=1.0),
    "rstd rounded": rstd_rounded,
    "eps of its own": lambda x, weight, eps: rms_norm(x, weight, 1e-6),
    "eps of the first call": lambda x, weight, eps, seen=[]: rms_norm(x, weight, (seen.append(eps), seen[0])[1]),  # noqa: B006
    "writes into x": writes_into_x,
    "fp32 result": lambda x, weight, eps: rms_norm(x, weight, eps).float(),
    "one row late": lambda x, weight, eps: rms_norm(x, weight, eps).roll(1, 0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_norm_is_noticed(fault: str) -> None:
    assert_is(rms_norm, "hf")
    with pytest.raises(AssertionError):
        assert_is(FAULTS[fault], "hf")


def test_formulas_differ_on_these_inputs() -> None:
    """But for one pair: rounded to bf16, both associations are the same here, and fp32 results tell them apart."""
    problem = exact_inputs("hf", "rmsnorm")[0]
    values = {name: expected(problem, name) for name in ("hf", "one-rounding", "all in bf16", "weight first")}
    same = {frozenset(pair) for pair in itertools.combinations(values, 2) if torch.equal(*map(values.get, pair))}
    assert same == {frozenset(["one-rounding", "weight first"])}
    in_order = spec(plan_named("fp32"), problem).hidden
    assert not torch.equal(expected(problem, "weight first, fp32"), in_order)


# ---------------------------------------------------------------- the list


def test_rows_are_distinct_and_say_how_they_run() -> None:
    keys = [(row.name, row.kind, row.how) for row in ROWS]
    assert len(set(keys)) == len(keys)
    assert {row.how for row in ROWS} <= {EAGER, OP_BY_OP, TRITON, *COMPILE, *JIT}
    assert {row.kind for row in ROWS} == {"rmsnorm", "head_norm"}
    assert {row.package for row in ROWS} == {"torch", "transformers", *OPTIONAL}


def test_modules_run_compiled_run_eager_and_both_ways() -> None:
    names = {row.name for row in ROWS if row.how in COMPILE}
    assert set(COMPILED) <= names
    for name in names:
        assert {row.how for row in ROWS if row.name == name and row.kind == "rmsnorm"} == {EAGER, *COMPILE}


def test_triton_kernels_are_never_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted kernel rounds otherwise than it does on a GPU, so its fingerprint would be wrong."""
    rows = [row for row in ROWS if row.how == TRITON]
    assert len(rows) == 10
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for row, device in itertools.product(rows, ("cpu", "cuda")):
        with pytest.raises(ValueError, match="unset it") as error:
            row.make(device)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", [row for row in ROWS if row.package in OPTIONAL], ids=row_id)
def test_missing_package_is_an_import_error(row: Implementation, monkeypatch: pytest.MonkeyPatch) -> None:
    module = OPTIONAL[row.package]
    for name in [module, *(name for name in sys.modules if name.startswith(module + "."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert row_id(row) in map(row_id, package_rows())
    with pytest.raises(ImportError):
        row.make("cpu")


def test_versions_name_the_package_and_what_it_runs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {row.name: row for row in ROWS}
    assert subject.describe_versions(rows["F.rms_norm"]) == f"torch {torch.__version__}"
    qwen3 = f"transformers {version('transformers')}, torch {torch.__version__}"
    assert subject.describe_versions(rows["Qwen3RMSNorm"]) == qwen3
    monkeypatch.setattr(subject, "version", {"jaxlib": "1.2.3"}.get)
    assert (
        subject.describe_versions(rows["flax.nnx.RMSNorm, bf16"])
        == "flax not installed, jax not installed, jaxlib 1.2.3"
    )


def test_more_values_of_eps_than_dynamo_allows_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limits, 8 for a function and 256 for a line of source that all rows share, are set lower here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    norm = next(row for row in ROWS if row.name == "nn.RMSNorm" and row.how == "torch.compile").make("cpu")
    x, weight = torch.full((2, 8), 1e-3).bfloat16(), torch.ones(8).bfloat16()
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            bind = packages.load_module("torch.nn", "RMSNorm")
            for eps in (1e-6, 2e-6, 3e-6):
                torch.compile(bind(8, eps), fullgraph=True, dynamic=False)(x, weight)
        for eps in (1e-6, 2e-6, 3e-6):
            assert torch.equal(norm(x, weight, eps), F.rms_norm(x, (8,), weight, eps))


def test_compiled_norms_never_run_uncompiled() -> None:
    def breaks(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        subject.compiled(breaks, None)(torch.ones(2))


# ---------------------------------------------------------------- optional packages, where they are installed

if version("jax"):

    def test_bits_survive_the_way_through_jax() -> None:
        import jax

        patterns = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
        array = subject.to_jax(patterns.view(torch.bfloat16), jax.devices("cpu")[0])
        assert str(array.dtype) == "bfloat16"
        assert torch.equal(subject.from_jax(array).view(torch.int16), patterns)

    @pytest.mark.parametrize("how", JIT)
    def test_compiler_options_reach_xla(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """On CPUs that option changes no bit, so that it is passed on is seen by one that XLA refuses."""
        row = next(row for row in ROWS if row.name == "Hugging Face's formula in JAX" and row.how == how)
        x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8).bfloat16()
        row.make("cpu")(x, weight, 1e-6)
        monkeypatch.setitem(JIT, how, {"xla_allow_excess_precisions": False})
        with pytest.raises(Exception, match="No such compile option"):
            row.make("cpu")(x, weight, 1e-6)


if version("liger-kernel"):

    @pytest.mark.parametrize("mode, offset", [("llama", 0.0), ("gemma", 1.0), ("none", 0.0)])
    def test_liger_gets_its_casting_mode(mode: str, offset: float, monkeypatch: pytest.MonkeyPatch) -> None:
        import liger_kernel.ops.rms_norm as liger

        def forward(x: Tensor, weight: Tensor, *flags: object) -> tuple[object, ...]:
            calls.append((x, weight, *flags))
            return x, x, weight, 0, 0, 0

        calls: list[tuple[object, ...]] = []
        monkeypatch.setattr(liger, "rms_norm_forward", forward)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        row = next(row for row in ROWS if row.name == f"LigerRMSNorm, casting mode {mode}")
        x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8).bfloat16()
        row.make("cuda")(x, weight, 1e-5)
        ((got_x, got_weight, *flags),) = calls
        assert torch.equal(got_x, x) and torch.equal(got_weight, weight)
        assert flags[:3] == [1e-5, offset, mode]


if version("fla-core"):

    def test_flash_linear_attention_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
        import fla.modules.norm.layernorm as fla

        calls: list[dict[str, object]] = []
        monkeypatch.setattr(fla, "rms_norm", lambda **arguments: calls.append(arguments) or arguments["x"])
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        row = next(row for row in ROWS if row.name == "flash-linear-attention RMSNorm")
        x, weight = torch.randn(3, 8).bfloat16(), torch.randn(8).bfloat16()
        row.make("cuda")(x, weight, 1e-5)
        (call,) = calls
        assert torch.equal(call["x"], x) and torch.equal(call["weight"], weight) and call["eps"] == 1e-5
        assert call["bias"] is None and call["residual"] is None
