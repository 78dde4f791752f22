"""The forms in which norms of engines take their arguments: each is identified as it is called."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import command
from torch import Tensor, nn

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import known
from castpoint.harness.fingerprint.forms import adapted
from castpoint.harness.fingerprint.kinds import guessed_kind
from castpoint.harness.fingerprint.norm import identify, summary
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.fingerprint.stores import round_to
from castpoint.kernels.plan import KEEP, RNE, RTZ
from castpoint.variants.catalogue import PLANS
from castpoint.variants.eager import eager_norm


def hf(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return eager_norm(x, weight, eps, False)


def out_first(out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
    out.copy_(hf(x, weight, eps))


def y_first(y: Tensor, x: Tensor, w: Tensor, epsilon: float) -> Tensor:
    return y.copy_(hf(x, w, epsilon))


def out_last(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
    out.copy_(hf(x, weight, eps))


def by_name(hidden_states: Tensor, *, gamma: Tensor, variance_epsilon: float) -> Tensor:
    return hf(hidden_states, gamma, variance_epsilon)


def eps_first(eps: float, weight: Tensor, x: Tensor) -> Tensor:
    return hf(x, weight, eps)


def with_mode(x: Tensor, mode: str = "llama", weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return hf(x, weight, eps) if mode == "llama" else x


def scaled(x: Tensor, weight: Tensor, eps: float, scale: float = 1.0, *, weights: Tensor | None = None) -> Tensor:
    assert weights is None
    return hf(x, weight, eps) * scale


def residual_second(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return hf(x + residual, weight, eps), x + residual


def in_place(x: Tensor, weight: Tensor, eps: float) -> None:
    x.copy_(hf(x, weight, eps))


def fused_in_place(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
    """As vLLM's fused_add_rms_norm."""
    residual += input
    input.copy_(hf(residual, weight, epsilon))


def optional_residual(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
    return hf(x, weight, eps) if residual is None else (hf(x + residual, weight, eps), x + residual)


class Norm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return hf(x, self.weight, self.variance_epsilon)
        return hf(x + residual, self.weight, self.variance_epsilon), x + residual


def hf_of_sum(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    return hf(x if residual is None else x + residual, weight, eps)


@torch.jit.script
def scripted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(torch.bfloat16)


torch.library.define("castpoint_forms::plain", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.impl("castpoint_forms::plain", "CompositeExplicitAutograd", hf)
torch.library.define("castpoint_forms::adds", "(Tensor x, Tensor weight, float eps, Tensor? residual=None) -> Tensor")
torch.library.impl("castpoint_forms::adds", "CompositeExplicitAutograd", hf_of_sum)
torch.library.define("castpoint_forms::rms_norm", "(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()")


@torch.library.impl("castpoint_forms::rms_norm", "CompositeExplicitAutograd")
def _rms_norm(result: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
    result.copy_(hf(input, weight, epsilon))


FORMS: dict[str, Callable[..., Any]] = {
    "out first": out_first,
    "y first": y_first,
    "out last": out_last,
    "by name": by_name,
    "eps first": eps_first,
    "a mode between": with_mode,
    "other names of the weight, with defaults": scaled,
    "residual second": residual_second,
    "in place": in_place,
    "fused in place": fused_in_place,
    "residual optional": optional_residual,
    "a module": Norm(256),
    "a class": Norm,
    "torch.ops": torch.ops.castpoint_forms.rms_norm,
    "torch.ops, overload": torch.ops.castpoint_forms.rms_norm.default,
    "torch.ops, in the usual order": torch.ops.castpoint_forms.plain,
    "torch.ops, residual optional": torch.ops.castpoint_forms.adds,
    "a scripted function": scripted,
    "a partial": functools.partial(with_mode, mode="llama"),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_norm_is_identified_as_it_is_called(name: str) -> None:
    answer = identify(FORMS[name], "rmsnorm")
    assert answer.status == "identified" and answer.plans == ["hf"], answer
    assert guessed_kind(adapted(FORMS[name])) == "rmsnorm"
    takes_residual = "residual" in name or "fused" in name or name in ("a module", "a class")
    assert ("x" in answer.candidates[0]) == takes_residual
    assert {c["result"] for c in answer.asked if c["about"] == "memory"} == {"same"}, answer.asked
    said = summary(answer).splitlines()
    assert ("y: is written into x" in said) == ("in place" in name)
    sums = {"fused in place": "x + residual: is written into residual", "residual second": "x + residual: is returned"}
    assert name not in sums or sums[name] in said


def test_functions_of_torch_take_the_shape_of_a_row() -> None:
    assert "one-rounding" in identify(nn.functional.rms_norm, "rmsnorm").plans
    assert identify(nn.functional.layer_norm, "rmsnorm").reason.endswith("the mean is subtracted: it is LayerNorm")


def test_a_module_of_one_width_says_which() -> None:
    said = identify(nn.RMSNorm(64, eps=1e-6), "rmsnorm").reason
    assert said.endswith("; its own weight has 64 channels: give --width 64"), said
    assert identify(nn.RMSNorm(64, eps=1e-6), "rmsnorm", sizes=Sizes(width=64)).status == "identified"


def test_every_argument_may_be_told_by_a_call() -> None:
    def odd(a: Tensor, b: float, c: Tensor, d: Tensor, *, mode: str, scale: float) -> None:
        assert mode == "llama" and scale == 1.0
        a.copy_(hf(c, d, b))

    assert identify(odd, "rmsnorm", call="odd(y, eps, x, w, mode='llama', scale=1.0)").plans == ["hf"]
    assert identify(residual_second, "rmsnorm", call="f(x, residual, w, eps)").candidates[0]["x"] == RNE


def test_a_chain_in_another_order_is_called_by_its_names() -> None:
    def fn(x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, num_q_heads: int, num_kv_heads: int,
           q_norm_weight: Tensor, k_norm_weight: Tensor, *, eps: float = 1e-6, plan: str = "hf") -> object:  # fmt: skip
        chain = known.chain(PLANS[plan].plan, "eager")
        return chain(x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight, eps, num_q_heads, num_kv_heads)

    assert identify(fn, "qkv").plans == ["hf"]


CALLS = {
    "fn(x, w)": "lacks eps",
    "fn(x, w, eps, q)": "has q, which is nothing that a norm takes",
    "fn(x, w, eps, open('f'))": "has open('f'), which is no constant",
    "x, w, eps": "is no call",
    "fn(x, w": "is no call",
    "fn(*x, w, eps)": "has *x, which is no constant",
    "fn(x, w, eps, **k)": "is no call",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_cannot_be_is_one_line(call: str) -> None:
    answer = identify(hf, "rmsnorm", call=call)
    assert answer.status == "error" and CALLS[call] in answer.reason and "\n" not in answer.reason, answer
    assert "give --call 'fn(out, x, w, eps)'" in answer.reason


def test_what_is_wrong_in_a_form_is_found() -> None:
    def beside(x: Tensor, weight: Tensor, eps: float) -> None:
        x.copy_(hf(x, weight, eps))
        if x._base is not None:
            x._base[0, 0] = 7.0

    def both(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = hf(x, weight, eps)
        x.mul_(2)
        return y

    def other_sum(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hf(x + residual, weight, eps), x

    def ignores_out_strides(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        torch.as_strided(out, x.shape, (x.shape[-1], 1)).copy_(hf(x, weight, eps))

    assert identify(beside, "rmsnorm").reason.endswith("the callable writes beside the view that it is given")
    assert identify(both, "rmsnorm").reason.startswith(
        "the callable writes into its inputs, and returns another tensor"
    )
    assert "it is not x + residual" in identify(other_sum, "rmsnorm").reason
    wrong = identify(ignores_out_strides, "rmsnorm")
    assert wrong.status in ("none", "error") and "rows of a packed buffer" in wrong.reason, wrong


@pytest.mark.parametrize(("held", "said"), [(KEEP, "is returned as fp32"), (RTZ, "is returned as bf16-rtz")])
def test_how_a_returned_sum_is_held(held: str, said: str) -> None:
    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = round_to(x.float() + residual.float(), held)
        return hf(x + residual, weight, eps), total if held == KEEP else total.to(x.dtype)

    answer = identify(norm, "rmsnorm")
    assert answer.candidates[0]["x"] == RNE and answer.facts["x + residual"] == said


def test_modules_and_classes_that_are_no_norm_are_told_so() -> None:
    class Two(nn.Module):
        def __init__(self, size: int, groups: int, eps: float = 1e-6) -> None:
            super().__init__()

    assert re.search(r"Two is a class that is made by \(size, groups, eps\)", identify(Two, "rmsnorm").reason)
    assert "holds 0 weights of one dimension (none)" in identify(nn.Identity(), "rmsnorm").reason
    two = nn.RMSNorm(256, eps=1e-6)
    two.gain = nn.Parameter(torch.ones(256))
    assert "holds 2 weights of one dimension (weight, gain)" in identify(two, "rmsnorm").reason
    assert "it is LayerNorm" in identify(nn.LayerNorm(256), "rmsnorm").reason

    class Elsewhere(nn.Module):
        def __init__(self, size: int, eps: float = 1e-6) -> None:
            raise RuntimeError("no such device")

    said = "Elsewhere(256, eps=1e-6) raised RuntimeError: no such device: make one, and name it"
    assert identify(Elsewhere, "rmsnorm").reason == said
    assert identify(nn.RMSNorm(256), "rmsnorm").reason == "RMSNorm has eps=None: make it with a number"
    with pytest.raises(Fault, match="keeps no eps that can be set"):
        module = nn.Linear(4, 4, bias=False)
        module.weight = nn.Parameter(torch.ones(4))
        adapted(module)(torch.ones(2, 4), torch.ones(4), 1e-6)


def test_the_command_takes_a_call(tmp_path: Path) -> None:
    (tmp_path / "norms.py").write_text(
        "import torch\n\ndef norm(gain, inp, e):\n"
        "    return torch.nn.functional.rms_norm(inp, inp.shape[-1:], gain, e)\n"
    )
    target = f"{tmp_path / 'norms.py'}:norm"
    done = command("identify", target, "--call", "norm(w, x, eps)", "--expect", "one-rounding")
    assert done.returncode == 0 and "the norm of one-rounding" in done.stdout, done.stderr
