"""What another process compiles before the plan is known is what is asked, and said besides, once it is."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from norm_support import linear_chain

from castpoint.harness.fingerprint import chain as fingerprint_chain
from castpoint.harness.fingerprint import norm as fingerprint_norm
from castpoint.harness.fingerprint.answer import Question
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.ptx import driver
from castpoint.variants.eager import eager_norm


def added_chain(x, residual, norm_weight, eps, qkv_weight, q_norm_weight, k_norm_weight, num_q_heads, num_kv_heads):
    x = x + residual
    return linear_chain(x, norm_weight, eps, qkv_weight, q_norm_weight, k_norm_weight, num_q_heads, num_kv_heads)


def norm_linear(x, weight, linear_weight, eps):
    return torch.nn.functional.linear(eager_norm(x, weight, eps, False), linear_weight)


def norm(x, weight, eps):
    return eager_norm(x, weight, eps, False)


def added_norm(x, residual, weight, eps):
    return eager_norm(x + residual, weight, eps, False), x + residual


def norm_in_8_bits(x, weight, eps, quant_scale):
    return (norm(x, weight, eps).float() / quant_scale).clamp(-448, 448).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    "fn, kind",
    [
        (linear_chain, "qkv"),
        (added_chain, "qkv"),
        (norm_linear, "norm_linear"),
        (norm, "rmsnorm"),
        (norm, "head_norm"),
        (added_norm, "rmsnorm"),
        (norm_in_8_bits, "rmsnorm"),
    ],
)
def test_what_is_compiled_ahead_is_what_is_asked(fn: Callable, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the plan is known: of every question the shapes, and but for those of a chain's residual the layouts."""
    guessed, real = [], []

    @contextlib.contextmanager
    def listing(questions: Callable[[], Iterable[Question]], ask: Callable, before: int) -> Iterator[Callable]:
        guessed.extend(questions())

        def asked(questions: Iterable[Question]) -> Iterator[Question]:
            for question in questions:
                real.append(question)
                yield question

        yield asked

    for module in (fingerprint_chain, fingerprint_norm):
        monkeypatch.setattr(module, "compiling", listing)
    answer = identify(fn, kind)
    assert answer.status == "identified", answer
    assert len(real) > 30

    def shown(question: Question) -> tuple[str, str]:
        return question.about, question.what.split(", eps")[0] if fn is added_chain else question.what

    assert [*map(shown, (each for each in guessed if each.about != "facts"))] == [*map(shown, real)]


@pytest.mark.parametrize(
    "fn, kind, facts",
    [(norm, "rmsnorm", "norm_facts"), (norm, "head_norm", "norm_facts"), (linear_chain, "qkv", "chain_facts")],
)
def test_what_is_said_besides_is_compiled_ahead(
    fn: Callable, kind: str, facts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the results are, which mean nothing, with all tensors that it needs when they mean something."""
    module = fingerprint_chain if kind == "qkv" else fingerprint_norm
    make, real, guessed, found = getattr(module, facts), set(), set(), None

    @functools.wraps(fn)
    def noting(*arguments: object, **named: object) -> object:
        tensors = [a for a in (*arguments, *named.values()) if isinstance(a, torch.Tensor)]
        if found is not None:
            found.add(tuple((a.dtype, a.shape, a.stride(), a.storage_offset(), a.requires_grad) for a in tensors))
        result = fn(*arguments, **named)
        nothing = (lambda y: y * float("nan")) if driver.compiles_only else (lambda y: y)
        return nothing(result) if isinstance(result, torch.Tensor) else tuple(map(nothing, result))

    def noted_facts(*of: object) -> dict[str, str]:
        nonlocal found
        found = guessed if driver.compiles_only else real
        said, found = make(*of), None
        return said

    @contextlib.contextmanager
    def asking(questions: Callable[[], Iterable[Question]], ask: Callable, before: int) -> Iterator[Callable]:
        *_, last = questions()
        with monkeypatch.context() as patched:
            patched.setattr(driver, "compiles_only", True)
            ask(last)
        yield iter

    monkeypatch.setattr(module, facts, noted_facts)
    monkeypatch.setattr(module, "compiling", asking)
    answer = identify(noting, kind)
    assert answer.status == "identified", answer
    assert len(real) > 10 and guessed == real
