"""The kinds of callables that are asked, and which kind one is by its names and arguments."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.arguments import NAMED, signature_of
from castpoint.harness.runs.errors import UserError

KINDS = {
    "rmsnorm": "fn(x, weight, eps) -> y; x, y [T, D]",
    "head_norm": "fn(x, weight, eps) -> y; x, y [T, H, Dh]",
    "qkv": "fn(x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight, eps, num_q_heads, num_kv_heads) -> (q, k, v)",
    "norm_linear": "fn(x, norm_weight, weight, eps) -> y; x [T, D], weight [N, D], y [T, N]",
    "qk_norm_rope": "fn(q, k, q_weight, k_weight, cos, sin, eps) -> (q, k); q [T, Hq, Dh], k [T, Hkv, Dh]",
}
CHAINS = ("qkv", "norm_linear")
OF_HEADS = re.compile(r"(?:^|_)(?:(?<!lm_)head|heads|headwise|headnorm|(?:q|k|v|qk)_norm)(?:_|$|\W)")  # in a name


def known(kind: str) -> str:
    """That kind; empty is any. Raises UserError for an unknown one."""
    if kind and kind not in KINDS:
        raise UserError(f"--kind must be one of {', '.join(KINDS)}, not {kind!r}")
    return kind


def guessed_kind(fn: Callable[..., Any]) -> str:
    """The kind whose arguments fn takes. Both norms take the same three: `head` in a name makes it a head norm.

    Raises Fault where it takes those of none, or of norms and chains alike.
    """
    names = [getattr(fn, "__name__", ""), *parameters_told(fn)]
    must = {name for name, p in signature_of(fn).parameters.items() if p.default is p.empty}
    if {"cos", "sin", "cos_sin_cache"} & must:
        said = "it rotates, but does not take, by name, what a qk_norm_rope takes, "
        raise Fault(f"{said}{KINDS['qk_norm_rope']}: wrap it in one, or give --kind qk_norm_rope and --call")
    norm, chain = (_takes(fn, KINDS[kind].partition(")")[0].count(",") + 1) for kind in ("rmsnorm", "qkv"))
    norm = norm or weightless(fn)
    if {"x", "norm_weight", "weight", "eps"} <= set(signature_of(fn).parameters):
        return "norm_linear"
    linear = _takes(fn, 6 if "num_q_heads" in names else 4)
    if not chain and linear and all("w" in name.lower() for name in names[2:4]) and names[4][:3] == "eps":
        return "norm_linear"
    if norm and chain and any("qkv" in name for name in names):
        norm = False
    if norm == chain:
        said = f"its arguments ({', '.join(names[1:])}) do not tell its kind: give --kind, {' or '.join(KINDS)}, or "
        raise Fault(f"{said}for a norm --call 'fn(x, w, eps)' as it is called")
    if chain:
        return "qkv"
    return "head_norm" if any(map(OF_HEADS.search, names)) else "rmsnorm"


def parameters_told(fn: Callable[..., Any]) -> list[str]:
    """fn's parameters without annotations, as far as it tells them."""
    return [str(p.replace(annotation=inspect.Parameter.empty)) for p in signature_of(fn).parameters.values()]


def _takes(fn: Callable[..., Any], count: int) -> bool:
    """Whether fn can be called with so many arguments by position, beside those of NAMED that it must have, and has
    names for them."""
    signature = signature_of(fn)
    named = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    try:
        bound = signature.bind(*range(count), **{name: None for name in named if name in NAMED})
    except TypeError:
        return False
    return not any(signature.parameters[name].kind == inspect.Parameter.VAR_POSITIONAL for name in bound.arguments)


def weightless(fn: Callable[..., Any]) -> bool:
    """Whether fn is a norm (x, eps)."""
    return list(signature_of(fn).parameters)[:2] == ["x", "eps"] and not _takes(fn, 3)


OPTIONAL = (
    {"rmsnorm": ("residual", "gate"), "head_norm": ("residual", "gate")}
    | dict.fromkeys(CHAINS, ("residual", "bias"))
    | {"qk_norm_rope": ()}
)


def paths(fn: Callable[..., Any], kind: str) -> list[tuple[str, ...]]:
    """Which of OPTIONAL fn is called with: what it must have, and that with each of the others by itself; of a norm all
    of them too, since a gate may be another with a residual."""
    parameters = signature_of(fn).parameters
    there = [name for name in OPTIONAL[kind] if name in parameters]
    must = tuple(name for name in there if parameters[name].default is inspect.Parameter.empty)
    others = [(*must, name) for name in there if name not in must]
    return [must, *others, *([tuple(there)] if len(others) > 1 and kind not in CHAINS else [])]
