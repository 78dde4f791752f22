"""The kind of a callable, guessed by its arguments where none is given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import command

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.forms import adapted
from castpoint.harness.fingerprint.kinds import guessed_kind
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import Sizes


def rms_norm(x, weight, eps):
    """A norm."""


def fallback_norm(x, weight, eps):
    """Whose name has k_norm in it, and is none."""


def norm_before_lm_head(x, weight, eps):
    """The head of a language model is no head of attention."""


def rms_norm_of_an_engine(x, weight, eps=1e-6, residual=None, out=None):
    """With more that has defaults."""


def k_norm(x, weight, eps):
    """Told by its own name."""


def norm_heads(x, head_weight, eps):
    """Told by an argument's name."""


def fused_add_rms_norm(x, residual, weight, eps):
    """A norm that must have a residual."""


def gated_k_norm(out, x, weight, z, eps):
    """Told by its own name, with a gate, in another order."""


def fused(x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight, eps, num_q_heads, num_kv_heads, bias=None):
    """A chain."""


def fused_with_defaults(x, norm_weight, qkv_weight, q_norm_weight=None, k_norm_weight=None, eps=1e-6, hq=16, hkv=8):
    """A chain of which three arguments would do."""


def fused_add(x, residual, weight, eps):
    """A norm with one argument more."""


def gated_norm(hidden_states, weight, gate, eps):
    """A norm with one argument more."""


def k_norm_gated(x, gamma, z, epsilon):
    """Told by its own name, with other names of its arguments."""


def seven(a, b, c, d, e, f, g):
    """Neither."""


def two(x, weight):
    """Neither."""


@pytest.mark.parametrize(
    ("fn", "kind"),
    [
        (rms_norm, "rmsnorm"),
        (rms_norm_of_an_engine, "rmsnorm"),
        (fallback_norm, "rmsnorm"),
        (norm_before_lm_head, "rmsnorm"),
        (lambda x, weight, eps: x, "rmsnorm"),
        (k_norm, "head_norm"),
        (norm_heads, "head_norm"),
        (adapted(fused_add_rms_norm), "rmsnorm"),
        (adapted(gated_k_norm), "head_norm"),
        (fused, "qkv"),
        (fused_with_defaults, "qkv"),
    ],
)
def test_a_kind_is_guessed(fn: Callable, kind: str) -> None:
    assert guessed_kind(fn) == kind


@pytest.mark.parametrize("fn", [seven, two, lambda *args: args, torch.nn.Identity(), dict.fromkeys])
def test_no_kind_is_guessed_where_arguments_do_not_tell(fn: Callable) -> None:
    with pytest.raises(Fault, match="do not tell its kind: give --kind, rmsnorm or .* or for a norm --call 'fn"):
        guessed_kind(fn)


@pytest.mark.parametrize("fn", [lambda x, cos, sin: x, lambda q, k, cos, sin: q, lambda positions, cos_sin_cache, a: a])
def test_a_rotation_alone_is_told_what_is_asked(fn: Callable) -> None:
    with pytest.raises(
        Fault, match="it rotates, but does not take, by name, .* fn.q, k, q_weight, k_weight, cos, sin, e"
    ):
        guessed_kind(fn)


@pytest.mark.parametrize(
    ("kind", "sizes", "said"),
    [
        ("rmsnorm", Sizes(heads=(2,), head_dim=64), "rmsnorm takes no --heads and no --head-dim: "),
        ("head_norm", Sizes(width=64), "head_norm takes no --width: "),
    ],
)
def test_sizes_that_a_kind_does_not_have_are_refused(kind: str, sizes: Sizes, said: str) -> None:
    assert identify(k_norm, kind, sizes=sizes).reason.startswith(said)


def test_a_norm_with_an_argument_more_is_guessed() -> None:
    assert guessed_kind(adapted(fused_add)) == guessed_kind(adapted(gated_norm)) == "rmsnorm"
    assert guessed_kind(adapted(k_norm_gated)) == "head_norm"


def test_the_command_says_which_it_took(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n\ndef rms_norm(x, weight, eps):\n"
        "    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)\n\ndef two(x, w):\n    return x\n"
    )
    done = command("identify", f"{tmp_path / 'mine.py'}:rms_norm", "--expect", "one-rounding")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "guessed by its signature: --kind rmsnorm"
    assert "the norm of" in done.stdout and "one-rounding" in done.stdout
    done = command("identify", f"{tmp_path / 'mine.py'}:two", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == 1 and answer["status"] == "error" and "give --kind" in answer["reason"]
