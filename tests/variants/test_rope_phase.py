"""RoPE's angles as a plan makes them: inv_freq, position and phase in the spec, in what runs a plan, and in the truth,
which asks no table."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
from nets import SMALL, exact_case
from support import KERNELS, assert_bit_equal, assert_inside, random_problem
from torch import Tensor
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from castpoint.harness.accuracy.errors import error_stats
from castpoint.harness.problems.drawn import THETA, synthetic_problem
from castpoint.kernels.plan import DEFAULT, KEEP, PHASE_BOUNDARIES, RNE, RTZ, CastPlan
from castpoint.variants import rope
from castpoint.variants import spec as spec_module
from castpoint.variants.backends import BACKENDS, run
from castpoint.variants.catalogue import plan_named
from castpoint.variants.envelope import envelope
from castpoint.variants.problem import Problem
from castpoint.variants.spec import round_to, spec, store, truth, with_table

PLAIN = plan_named("fp32").replace(out=KEEP)
MOVES = [(name, word) for name in PHASE_BOUNDARIES for word in (RNE, RTZ)]


def at(problem: Problem, positions: Tensor) -> Problem:
    return problem.replace(positions=positions, theta=THETA)


def table_by_hand(name: str, word: str, rows: int, head_dim: int) -> Tensor:
    """cos and sin [rows, head_dim] in the fp32 arithmetic of a framework, one of its three steps rounded."""
    held = {boundary: word if boundary == name else KEEP for boundary in PHASE_BOUNDARIES}
    inv_freq = round_to(rope.frequencies(THETA, head_dim).float(), held["inv_freq"])
    position = round_to(torch.arange(rows).float(), held["position"])
    angle = round_to(position[:, None] * inv_freq, held["phase"]).double()
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


# ---------------------------------------------------------------- the spec


@pytest.mark.parametrize(("name", "word"), [("", KEEP), *MOVES])
def test_a_word_is_the_table_that_fp32_arithmetic_makes_with_it(name: str, word: str):
    still = random_problem(tokens=7, head_dim=64)
    positions = torch.tensor([0, 1, 257, 1003, 4000, 4095, 15_962])
    plan = PLAIN.replace(**{name: word} if name else {})
    made = spec(plan, at(still, positions))
    given = at(still, positions).replace(cos_sin_cache=table_by_hand(name, word, 15_963, 64))
    for output, expected in spec(PLAIN, given).outputs().items():
        assert_bit_equal(actual=made.outputs()[output], expected=expected, what=output)
    assert torch.equal(made.k, spec(PLAIN, at(still, positions)).k) == (word == KEEP), "the test would not notice"


def test_phases_are_transformers_of_the_same_frequencies(monkeypatch: pytest.MonkeyPatch):
    """Bit for bit the product, up to the last bit of fp32 its cos and sin; its frequencies up to two ulps."""
    config = Qwen3Config(head_dim=128, hidden_size=128, num_attention_heads=1)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    module, positions = Qwen3RotaryEmbedding(config), torch.tensor([0, 1, 1000, 4095, 131_071])
    exact = rope.frequencies(THETA, 128)
    assert ((module.inv_freq.double() - exact).abs() <= 2.0**-23 * exact).all()
    monkeypatch.setattr(rope, "frequencies", lambda theta, head_dim: module.inv_freq.double())
    angles = rope.phase(DEFAULT, positions, THETA, 128, store)
    assert torch.equal(angles.float(), positions.float()[:, None] * module.inv_freq)
    ours = rope.rows(DEFAULT, positions, THETA, 128, store).chunk(2, dim=-1)
    for own, theirs in zip(ours, module(torch.zeros(1), positions[None]), strict=True):
        assert ((own - theirs[0, :, :64].double()).abs() <= 2.0**-24).all()


# ---------------------------------------------------------------- the truth


def with_bf16_frequencies(problem: Problem) -> Problem:
    """The problem with the table of an engine that holds inv_freq in bf16."""
    rows = int(problem.positions.max()) + 1
    return problem.replace(cos_sin_cache=table_by_hand("inv_freq", RNE, rows, problem.head_dim))


def distances(module: ModuleType) -> tuple[float, float]:
    """K's error of `hf` against that module's truth, with a right table and with one of bf16 frequencies."""
    drawn = synthetic_problem(layer=0, tokens=16)
    alike = torch.full_like(drawn.k_norm_weight, 129 / 128)  # all pairs of channels count alike
    right = at(drawn.replace(k_norm_weight=alike), torch.full((16,), 4000))
    wrong = with_bf16_frequencies(right)
    return tuple(
        error_stats(actual=spec(plan_named("hf"), p).k, reference=module.truth(p).k).rel_rms for p in (right, wrong)
    )


def test_the_truth_asks_no_table():
    right, wrong = distances(spec_module)
    assert right < 0.005 and wrong == pytest.approx(0.445, abs=0.01)


def test_a_truth_that_takes_the_table_for_granted_is_noticed():
    """The planted fault is what stood here: K is 40 % off, and looked as near to it as ever."""
    source = inspect.getsource(spec_module)
    assert source.count(", problem.replace(cos_sin_cache=None)") == 1
    planted = ModuleType("planted")
    planted.__dict__["__name__"] = spec_module.__name__
    exec(source.replace(", problem.replace(cos_sin_cache=None)", ", problem"), planted.__dict__)
    right, wrong = distances(planted)
    assert right < 0.005 and wrong < 0.005


def test_the_truth_rounds_no_angle():
    """Against angles in 40 digits; of fp32 angles it would be 2e-4 off."""
    from decimal import Decimal, getcontext

    getcontext().prec = 40
    problem = at(random_problem(tokens=1, num_q_heads=1, head_dim=32), torch.tensor([131_071]))
    before, after = truth(problem.replace(positions=None)), truth(problem)
    turn = Decimal("6.283185307179586476925286766559005768394")
    angles = [131_071 * Decimal(1_000_000) ** (Decimal(-2 * i) / 32) % turn for i in range(16)]
    angles = torch.tensor([float(angle) for angle in angles], dtype=torch.float64)
    first, second = before.k.chunk(2, dim=-1)
    expected = torch.complex(first, second) * torch.complex(angles.cos(), angles.sin())
    found = torch.complex(*after.k.chunk(2, dim=-1))
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert (truth(problem).k - spec(PLAIN, problem).k).abs().max() > 1e-7 * expected.abs().max()


# ---------------------------------------------------------------- what runs a plan


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "word"), MOVES)
def test_what_runs_a_plan_makes_its_table(name: str, word: str, backend: str):
    plan = plan_named("hf").replace(out=KEEP, **{name: word})
    problem, expected = exact_case(plan, products="many", rope=True, **SMALL)
    for (output, wanted), actual in zip(expected.items(), run(plan, problem, backend), strict=True):
        assert_bit_equal(actual=actual.double(), expected=wanted, what=output)
    other = spec(plan.replace(**{name: KEEP}), problem)
    assert not torch.equal(other.q, expected["q"]), "the test would not notice"


@pytest.mark.parametrize(("name", "word"), MOVES)
def test_the_envelope_is_of_that_table(name: str, word: str):
    plan = plan_named("one-rounding").replace(**{name: word})
    problem = random_problem(rope=True)
    assert_inside(actual=KERNELS.run(plan, problem), allowed=envelope(plan, problem))
    with pytest.raises(AssertionError, match="outside the envelope"):
        assert_inside(actual=KERNELS.run(plan.replace(**{name: KEEP}), problem), allowed=envelope(plan, problem))


def test_a_table_has_a_row_a_position_and_is_made_once():
    problem = at(random_problem(tokens=3), torch.tensor([5, 0, 1]))
    once = with_table(DEFAULT, problem)
    assert once.cos_sin_cache.shape == (6, problem.head_dim) and once.cos_sin_cache.dtype == torch.float32
    assert once.cos_sin_cache.isnan().all(dim=1).tolist() == [False, False, True, True, True, False]
    assert with_table(plan_named("hf").replace(phase=RNE), once) is once
    still, none = random_problem(), random_problem(tokens=0, rope=True)
    assert with_table(DEFAULT, still) is still and with_table(DEFAULT, none).cos_sin_cache.shape == (0, 32)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("name", PHASE_BOUNDARIES)
def test_a_plan_that_makes_its_table_is_refused_one(name: str):
    plan: CastPlan = plan_named("hf").replace(**{name: RNE})
    problem = with_table(DEFAULT, random_problem(rope=True))
    doors = [spec, envelope, *(lambda plan, p, backend=backend: run(plan, p, backend) for backend in BACKENDS)]
    for door in doors:
        with pytest.raises(ValueError, match=f"a plan with {name}='bf16-rne' makes its own table") as error:
            door(plan, problem)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"theta": None}, "positions need theta, the base of RoPE's frequencies .1e6 for Qwen3., not None"),
        ({"theta": 0.0}, "not 0.0"),
        ({"theta": torch.inf}, "not inf"),
        ({"theta": "1e6"}, "not '1e6'"),
        ({"positions": torch.full((33,), -1)}, "positions must not be negative, as -1 is"),
        ({"positions": torch.zeros(33)}, "positions must be torch.int64"),
        ({"positions": torch.zeros(32, dtype=torch.int64)}, r"positions must have shape \[33\]"),
    ],
)
def test_positions_and_theta_are_checked_at_the_door(changes: dict, words: str):
    with pytest.raises(ValueError, match=words) as error:
        random_problem(rope=True).replace(**changes)
    assert "\n" not in str(error.value)
