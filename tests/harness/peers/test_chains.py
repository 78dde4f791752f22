"""Each peer computes the function that its row names, or says why it does not run."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support import assert_bit_equal, assert_inside, random_problem

import castpoint.kernels.head_norm
from castpoint.harness.peers import chains as peers
from castpoint.harness.peers import parts as peers_parts
from castpoint.harness.peers.chains import (
    P2,
    chain_peer,
    chain_plan,
    compiled_peers,
    eager_peer,
    head_norm_peer,
    matmul_peers,
    norm_peers,
)
from castpoint.harness.peers.parts import OWN_KERNEL, tuned
from castpoint.harness.problems.exact import exact_problem
from castpoint.harness.runs.words import Kind
from castpoint.harness.timing.rig import rotated
from castpoint.kernels.head_norm import head_norm
from castpoint.kernels.plan import KEEP, RNE, ROPE_BOUNDARIES, RTZ, CastPlan
from castpoint.variants.catalogue import PLANS, plan_named
from castpoint.variants.eager import eager, eager_norm
from castpoint.variants.envelope import Interval, envelope
from castpoint.variants.problem import Problem, rotate_half
from castpoint.variants.spec import cos_sin, spec, store

HERE = ("eager", "F.rms_norm")  # norms that run on a CPU
HF = plan_named("hf")


@functools.cache
def problems(weight_offset: bool = False, head_norm: bool = True) -> list[Problem]:
    return rotated(random_problem(weight_offset=weight_offset, head_norm=head_norm), 2)


@functools.cache
def allowed(plan: CastPlan, i: int, head_norm: bool = True) -> dict[str, Interval]:
    return envelope(plan, problems(plan.weight_offset != "none", head_norm)[i])


def named(outputs: tuple) -> dict[str, torch.Tensor]:
    return dict(zip("qkv", outputs, strict=True))


# ---------------------------------------------------------------- what they compute


@pytest.mark.parametrize("norm", HERE)
def test_chains_lie_in_the_envelope_of_their_plan(norm: str):
    given = problems()
    for plan in (HF, plan_named("one-rounding")):
        chain = chain_peer(given, norm, "cuBLAS", plan)
        assert chain.name == f"P1 {norm} | cuBLAS | {OWN_KERNEL}" and chain.status == "ok"
        for i in range(len(given)):
            outputs = chain.call(i)
            assert [list(t.shape) for t in outputs] == [[33, 2, 32], [33, 1, 32], [33, 1, 32]]
            assert all(t.dtype == torch.bfloat16 for t in outputs)
            assert_inside(actual=named(outputs), allowed=allowed(chain.plan, i), what=chain.name)
            for name in ("normed", "head_normed"):  # the plan says which roundings there are, and which not
                moved = chain.plan.replace(**{name: KEEP if getattr(chain.plan, name) == RNE else RNE})
                with pytest.raises(AssertionError, match="outside the envelope"):
                    assert_inside(actual=named(outputs), allowed=allowed(moved, i))


def test_a_chain_of_weights_stored_less_one():
    gemma = plan_named("gemma")
    chain = chain_peer(problems(weight_offset=True), "eager", "cuBLAS", gemma)
    assert chain.plan == gemma and chain.function == "gemma"
    assert_inside(actual=named(chain.call(1)), allowed=allowed(chain.plan, 1))
    with pytest.raises(AssertionError, match="outside the envelope"):
        assert_inside(actual=named(chain.call(1)), allowed=allowed(plan_named("gemma-bf16-offset"), 1))


def test_the_eager_peer_is_eager():
    for i, p in enumerate(problems()):
        for actual, expected in zip(eager_peer(problems()).call(i), eager(p), strict=True):
            assert_bit_equal(actual=actual, expected=expected)
    assert eager_peer(problems()).function == "hf" and eager_peer(problems(weight_offset=True)).function == "gemma"


class Counted:
    """head_norm_kernel, and how often it was launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel, self.grids = castpoint.kernels.head_norm.head_norm_kernel, []
        monkeypatch.setattr(castpoint.kernels.head_norm, "head_norm_kernel", self)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        self.grids.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("norm", HERE)
def test_q_and_k_are_finished_in_one_launch_of_every_chain(norm: str, rope: bool, monkeypatch: pytest.MonkeyPatch):
    given, counted = rotated(random_problem(rope=rope), 2), Counted(monkeypatch)
    chain_peer(given, norm, "cuBLAS", HF).call(1)
    assert counted.grids == [(3, 3)], "blocks of 16 of 33 tokens, 2 heads of q and 1 of k"
    counted.grids.clear()
    head_norm_peer(given, HF).call(1)
    assert len(counted.grids) == 1
    for heads, weight in ((2, given[0].q_norm_weight), (1, given[0].k_norm_weight)):  # what a chain must not do
        head_norm(torch.ones(33, heads, 32, dtype=torch.bfloat16), weight)
    assert len(counted.grids) == 3, "the count would not notice"


def test_the_head_norm_of_a_chain_writes_where_proj_lies():
    q, k, v = chain_peer(problems(), "eager", "cuBLAS", HF).call(0)
    assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1


def test_copies_are_told_apart():
    chain = chain_peer(problems(), "eager", "cuBLAS", HF)
    assert not torch.equal(chain.call(0)[2], chain.call(1)[2])


def test_our_head_norm_takes_the_plans_words():
    plan = HF.replace(head_rstd=RNE, head_normed=RTZ)
    chain = chain_peer(problems(), "F.rms_norm", "cuBLAS", plan)
    assert chain.plan.without_rope() == CastPlan(proj=RNE, head_rstd=RNE, head_normed=RTZ)
    assert_inside(actual=named(chain.call(0)), allowed=allowed(chain.plan, 0))
    with pytest.raises(AssertionError, match="outside the envelope"):
        assert_inside(actual=named(chain.call(0)), allowed=allowed(chain.plan.replace(head_rstd=KEEP), 0))


def test_models_without_a_head_norm(monkeypatch: pytest.MonkeyPatch):
    given, counted = problems(head_norm=False), Counted(monkeypatch)
    chain = chain_peer(given, "eager", "cuBLAS", HF)
    assert_inside(actual=named(chain.call(1)), allowed=allowed(chain.plan, 1, head_norm=False))
    only = head_norm_peer(given, HF)
    assert (only.status, only.reason) == ("not applicable", "no head norm in this problem")
    assert chain.name == "P1 eager | cuBLAS | none" and not counted.grids
    turned = rotated(random_problem(head_norm=False, rope=True, residual=False), 2)
    chain = chain_peer(turned, "eager", "cuBLAS", HF)
    assert_inside(actual=named(chain.call(1)), allowed=envelope(chain.plan, turned[1]))
    assert chain.name == f"P1 eager | cuBLAS | {OWN_KERNEL}" and len(counted.grids) == 1, "heads are rotated, or twice"


def test_parts_are_those_of_the_chain():
    p, given = problems()[1], problems()
    x = p.x + p.residual
    by_name = {peer.name: peer for peer in (*norm_peers(given), head_norm_peer(given, HF), *matmul_peers(given))}
    hidden = {"norm eager": eager_norm(x, p.norm_weight, p.eps, False)}
    hidden["norm F.rms_norm"] = F.rms_norm(x, [200], p.norm_weight, p.eps)
    for name, expected in hidden.items():
        assert_bit_equal(actual=by_name[name].call(1)[0], expected=expected)
    assert_bit_equal(actual=by_name["P4 cuBLAS"].call(1)[0], expected=F.linear(p.x, p.qkv_weight, p.bias))
    q, k, _ = given[0].split_heads(F.linear(given[0].x, given[0].qkv_weight, given[0].bias))  # one proj for all calls
    before = q.clone()
    for actual, value, weight in zip(
        by_name[f"heads {OWN_KERNEL}"].call(1), (q, k), (p.q_norm_weight, p.k_norm_weight), strict=True
    ):
        assert_bit_equal(actual=actual, expected=head_norm(value, weight, p.eps, plan=HF))
    assert torch.equal(q, before), "the shared proj was overwritten: the next call reads another"


# ---------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("residual", [False, True])
def test_compiled_eager_rounds_once_a_norm_and_compiles_once_for_all_layers(residual: bool):
    """Inductor keeps x + residual in fp32 too, which eager rounds: with a residual it is no plan of the catalogue."""
    first = random_problem(residual=residual)
    given = [first, rotated(first, 2)[1].replace(layer=7)]
    plain, pdl = compiled_peers(given)
    assert (plain.status, pdl.status) == ("ok", "ok")
    assert plain.function == ("rounds hidden, proj, out, not x + residual" if residual else "one-rounding")
    for peer in (plain, pdl):
        peer.call(0)
        with torch.compiler.set_stance("fail_on_recompile"):
            outputs = named(peer.call(1))
        assert_inside(actual=outputs, allowed=envelope(peer.plan, given[1]))
        for wrong in (HF, peer.plan.replace(x=RNE)) if residual else (HF,):
            with pytest.raises(AssertionError, match="outside the envelope"):
                assert_inside(actual=outputs, allowed=envelope(wrong, given[1]))


def test_tuning_is_on_and_graphs_are_ours(monkeypatch: pytest.MonkeyPatch):
    asked = []
    monkeypatch.setattr(peers_parts, "compiled", lambda function, options: asked.append(options))
    tuned.__wrapped__(eager)
    tuned.__wrapped__(eager, True)
    common = {"max_autotune": True, "coordinate_descent_tuning": True}
    assert asked == [common, common | {"triton.enable_pdl": True}]


def test_an_inductor_without_pdl_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers_parts, "PDL", "triton.enable_what")
    tuned.cache_clear()
    plain, pdl = compiled_peers(problems())
    assert plain.status == "ok" and pdl.status == "not applicable"
    assert pdl.reason == f"Inductor of torch {torch.__version__} has no option triton.enable_what"
    tuned.cache_clear()


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize(
    ("norm", "plan", "function"),
    [
        ("eager", "hf", "hf"),
        ("F.rms_norm", "one-rounding", "one-rounding"),
        ("quack rmsnorm", "one-rounding", "one-rounding"),
        ("F.rms_norm", "hf", "separate-head-norm"),
        ("LigerRMSNorm, casting mode llama", "hf", "hf"),
        ("eager", "one-rounding", "rounds normed, hidden, proj, out"),
        ("FlagGems rms_norm", "hf", "not known"),
    ],
)
def test_functions_by_name(norm: str, plan: str, function: str):
    whole = chain_plan(norm, plan_named(plan), offset=False)
    assert peers.Peer(Kind.CHAIN, "", None, whole).function == function


def test_a_plan_that_rounds_statistics_in_one_norm_only_has_no_name():
    assert chain_plan("eager", plan_named("bf16-statistics"), offset=False) is None


def test_plans_of_the_catalogue_are_known_by_name():
    assert all(peers.Peer(Kind.CHAIN, "", None, known.plan).function == name for name, known in PLANS.items())


# ---------------------------------------------------------------- with positions


@pytest.fixture(scope="module")
def turned() -> list[Problem]:
    return rotated(random_problem(rope=True, residual=False), 2)


@pytest.mark.parametrize("plan", ["hf", "one-rounding"])
def test_our_head_norm_rotates_as_the_plan_says(plan: str, turned: list[Problem]):
    chain = chain_peer(turned, "F.rms_norm", "cuBLAS", plan_named(plan))
    outputs = named(chain.call(1))
    assert_inside(actual=outputs, allowed=envelope(chain.plan, turned[1]))
    for name in ROPE_BOUNDARIES:
        moved = chain.plan.replace(**{name: KEEP if getattr(chain.plan, name) == RNE else RNE})
        with pytest.raises(AssertionError, match="outside the envelope"):
            assert_inside(actual=outputs, allowed=envelope(moved, turned[1]))
    assert chain.function == {"one-rounding": "one-rounding", "hf": "separate-head-norm"}[plan]
    assert dataclasses.replace(chain, plan=HF.replace(cos_sin=RTZ)).function.endswith("unrotated, cos_sin, products")


def test_compiled_eager_rounds_one_of_the_two_heads_that_it_turns():
    """Inductor cancels the rounding of a head on its way to one product and keeps it on its way to the other."""
    problem = exact_problem(HF, rope=True)
    (peer,) = compiled_peers([problem], P2[:1])
    assert (peer.plan, peer.function, eager_peer([problem]).function) == (None, "not known", "hf")
    chain = spec(plan_named("one-rounding").replace(out=KEEP), problem.replace(positions=None, cos_sin_cache=None))
    cos, sin = cos_sin(HF, problem)  # a bf16 table, as the model makes it
    outputs = named(peer.call(0))
    for name in ("q", "k"):
        head = getattr(chain, name)
        sums = [
            store(a * cos, KEEP) + store(rotate_half(b) * sin, KEEP)
            for a in (head, store(head, RNE))
            for b in (head, store(head, RNE))
        ]
        neither, crossed, own, both = (store(value, RNE) for value in sums)
        assert_bit_equal(actual=outputs[name], expected=crossed, what=name)
        assert all((other != crossed).any() for other in (neither, own, both)), "the test would not notice"
