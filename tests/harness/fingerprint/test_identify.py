"""The fingerprint names plans whose answer is known, and would not if its rows or its predictions were wrong."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import castpoint.harness.fingerprint.rules as family
from castpoint.harness.fingerprint import known, probes
from castpoint.harness.fingerprint.answer import Answer, words_of
from castpoint.harness.fingerprint.evidence import UNEXPLAINED
from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.probes import EPS_LARGE, norm_rows
from castpoint.harness.fingerprint.rules import Rule, arithmetic, norm_rules, predict
from castpoint.kernels.plan import KEEP, OPTIONAL, RNE, RTZ, CastPlan
from castpoint.variants.catalogue import HF, ONE_ROUNDING, PLANS
from castpoint.variants.eager import eager_norm
from castpoint.variants.spec import round_to

SPREAD = known.norm_plans()[5::61]  # twelve; 61 shares no factor with 3, so that every word of every boundary occurs


def right(answer: Answer, plan: CastPlan, kind: str, source: str) -> bool:
    """Whether the answer is that plan and no other, and its fp32 arithmetic that of the source: spec or kernel."""
    if answer.status != "identified":
        return False
    words, planted = answer.candidates[0], known.expected(plan, kind)
    fp32 = {"eps": "float32" if source == "triton" else "float64", "root": "rsqrt", "order": "(x*rstd)*w"}
    return planted.items() <= words.items() and all(v in words[k].split(" or ") for k, v in fp32.items())


def quick(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel, which refuses what takes long where it is interpreted: such calls are left out. PTX of every
    named chain and a tenth of all norms is asked at all sizes in the confusion table."""

    @functools.wraps(kernel)
    def refusing(x: Tensor, *rest: Any) -> Any:
        if x.numel() > 1 << 15:
            raise ValueError("large")
        return kernel(x, *rest)

    return refusing


def test_the_spread_has_every_word_of_every_boundary() -> None:
    for name, words in known.expected(SPREAD[0], "rmsnorm").items():
        assert {known.expected(plan, "rmsnorm")[name] for plan in SPREAD} == {
            known.expected(plan, "rmsnorm")[name] for plan in known.norm_plans()
        }, (name, words)


@pytest.mark.parametrize("plan", SPREAD, ids=lambda plan: "-".join(plan.roundings()) or "none")
def test_a_norm_is_named_by_its_spec_its_kernel_and_with_noise(plan: CastPlan) -> None:
    subjects = {
        "spec": ("rmsnorm", known.spec_norm(plan)),
        "spec with noise": ("rmsnorm", known.with_noise(known.spec_norm(plan))),
        "triton": ("head_norm", quick(known.triton_head_norm(plan))),
    }
    if SPREAD.index(plan) != 5:  # the fullest plan alone
        del subjects["triton"]
    for source, (kind, fn) in subjects.items():
        answer = identify(fn, kind)
        assert right(answer, plan, kind, source), (source, answer)
        assert answer.share_equal > 1 - UNEXPLAINED > answer.runner_up_share_equal


@pytest.mark.parametrize("name", ["hf", "fp32", "cast-after-matmul", "deferred", "folded", "bf16-statistics", "gemma"])
def test_a_chain_is_named_by_its_spec(name: str) -> None:
    plan = PLANS[name].plan
    answer = identify(known.chain(plan, "spec"), "qkv")
    assert right(answer, plan, "qkv", "spec"), answer


@pytest.mark.parametrize("name", ["hf", "fp32-tf32x3"])
def test_a_chain_is_named_by_its_kernel(name: str) -> None:
    plan = PLANS[name].plan
    answer = identify(quick(known.chain(plan, "triton")), "qkv")
    assert right(answer, plan, "qkv", "triton"), answer


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
    assert least > UNEXPLAINED + known.NOISY, least


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


# ---------------------------------------------------------------- the catalogue's names


def test_a_plan_has_the_words_of_its_parts() -> None:
    plan = HF.replace(rstd=RTZ, head_rstd=RNE, hidden=RTZ, out=KEEP)
    both = {"statistics": KEEP, "variance": KEEP, "weight_offset": "none"}
    assert words_of(plan, "rmsnorm") == {**both, "rstd": RTZ, "normed": RNE, "hidden": RTZ}
    assert words_of(plan, "head_norm") == {**both, "head_rstd": RNE, "head_normed": RNE, "out": KEEP}
    assert words_of(plan, "qkv").items() >= {**both, "proj": RNE, "scale": "prologue", "matmul": "bf16"}.items()
    assert not words_of(plan, "qkv").keys() & set(OPTIONAL)
    assert known.expected(plan, "head_norm") == {**both, "head_rstd": RTZ, "head_normed": RNE, "out": RTZ}
    for name, named in PLANS.items():
        norm = ("rstd", "normed", "hidden", *both) if name not in ("deferred", "folded") else ()
        assert words_of(named.plan, "rmsnorm") == {word: getattr(named.plan, word) for word in norm}, name
        left_out = OPTIONAL  # what no chain without residual and positions shows
        chain = {word: said for word, said in vars(named.plan).items() if word not in left_out}
        assert words_of(named.plan, "qkv") == known.expected(named.plan, "qkv") == chain, name


def test_an_answer_names_the_plans_that_have_its_words() -> None:
    norm, head = (identify(lambda x, w, eps: eager_norm(x, w, eps, False), kind) for kind in ("rmsnorm", "head_norm"))
    chain = identify(known.chain(ONE_ROUNDING, "spec"), "qkv")
    assert "= the norm of hf" in summary(norm).splitlines()
    assert "= the head norm of hf, separate-head-norm" in summary(head).splitlines()
    assert chain.plans == ["one-rounding"] and "= one-rounding" in summary(chain).splitlines()
    unnamed = identify(known.spec_norm(HF.replace(statistics=RTZ)), "rmsnorm")
    assert unnamed.status == "identified" and unnamed.plans == [] and "\n= " not in summary(unnamed)


def test_a_nearest_plan_that_explains_less_than_half_is_not_shown() -> None:
    far, near = (dataclasses.replace(Answer("none"), nearest={"rstd": KEEP}, share_equal=share) for share in (0.4, 0.6))
    assert "nearest" not in summary(far) and "nearest: rstd=fp32" in summary(near)


# ---------------------------------------------------------------- planted faults of the fingerprint itself


def forget() -> None:
    """Drops every search and prediction that is remembered."""
    probes._first_rows.cache_clear()
    probes.telling_rows.cache_clear()


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was searched and predicted without the fault is not remembered with it, nor the other way round."""
    forget()
    yield
    monkeypatch.undo()
    forget()


def test_a_wrong_prediction_would_be_noticed(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    """If the family rounded to nearest where it says truncated, a truncating kernel would be named otherwise."""
    plan = HF.replace(normed=RTZ)
    assert right(identify(known.spec_norm(plan), "rmsnorm"), plan, "rmsnorm", "spec")
    forget()
    monkeypatch.setattr(family, "round_to", lambda v, s: round_to(v, RNE if s == RTZ else s))
    assert not right(identify(known.spec_norm(plan), "rmsnorm"), plan, "rmsnorm", "spec")


def test_inexact_rows_would_be_noticed(monkeypatch: pytest.MonkeyPatch, forgetful: None) -> None:
    """With weights of one, no product with the weight is rounded: normed and hidden cannot be told apart."""
    monkeypatch.setattr(probes, "norm_weight", lambda width, rng: torch.ones(width))
    assert not right(identify(known.spec_norm(HF), "rmsnorm"), HF, "rmsnorm", "spec")


def test_what_is_remembered_is_what_was_searched() -> None:
    """An identification that finds its rows searched answers as the first, and leaves them as they were."""
    forget()
    first = identify(known.spec_norm(HF), "rmsnorm")
    rows, _ = probes.first_rows(probes.WIDTH, residual=False)
    before, hits = rows.x.clone(), probes.telling_rows.cache_info().hits
    again = identify(known.spec_norm(HF), "rmsnorm")
    assert dataclasses.replace(again, seconds=first.seconds) == first
    assert probes.telling_rows.cache_info().hits > hits
    assert probes.first_rows(probes.WIDTH, residual=False)[0] is rows and torch.equal(rows.x, before)
