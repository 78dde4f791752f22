"""How a norm takes its arguments: the forms that engines have, each made fn(x, weight, eps) of kinds.KINDS.

Functions with other names or another order of arguments, with arguments by name alone, without a weight, that write to
`out` or in place, or store 8 bits with a scale; torch.ops; modules and their classes, which hold weight and eps
themselves; functions of JAX. What a call leaves out keeps its default.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from triton.runtime.jit import KernelInterface

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.arguments import (
    LEFT_OUT,
    MADE,
    MEANING,
    NAMED,
    meaning_of,
    parameters_of,
    signed,
    weights_in,
)
from castpoint.harness.fingerprint.blackbox import BlackBox, Unasked
from castpoint.harness.fingerprint.kinds import CHAINS, KINDS, OPTIONAL
from castpoint.harness.fingerprint.modules import of_class, of_module
from castpoint.harness.fingerprint.sums import Sums, totals
from castpoint.harness.peers.running import from_jax, to_jax
from castpoint.kernels.plan import RNE

QUANT_SCALE = 4.0  # of static quantisation: what is stored is a value divided by it
LINEAR = ("x", "norm_weight", "weight", "eps")
CHAIN = tuple(KINDS["qkv"].partition("(")[2].partition(")")[0].split(", "))


@dataclass(frozen=True)
class Form:
    """A call: what each argument is, by position and by name; a name of ALIASES, or a constant of the user's."""

    places: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def names(self) -> list[str]:
        return [part.name for part in (*self.places, *self.named.values()) if isinstance(part, Name)]

    def call(self, fn: Callable[..., Any], values: dict[str, Any]) -> Any:
        def given(part: Any) -> Any:
            return values[part.name] if isinstance(part, Name) else part

        return fn(*map(given, self.places), **{name: given(part) for name, part in self.named.items()})


@dataclass(frozen=True)
class Name:
    name: str


def adapted(fn: Callable[..., Any], call: str = "") -> Callable[..., Any]:
    """fn as a function (x, weight, eps), with residual where it takes one. call: how it is called, fn(out, x, w, eps);
    empty: by the names of its arguments. fn itself where they are three in that order, or do not tell.

    Raises Fault for a Triton kernel, which needs a launcher, and for a call that does not fit.
    """
    if isinstance(fn, KernelInterface):
        raise Fault(
            "a Triton kernel returns nothing: name its launcher, a Python function that makes the output, launches the "
            "kernel and returns it"
        )
    fn = _through_jax(fn)
    if call and (isinstance(fn, nn.Module) or inspect.isclass(fn)):
        raise Fault("--call is for a function: of a module its forward is called, so leave it out, or wrap it in one")
    if inspect.isclass(fn) and issubclass(fn, nn.Module):
        return of_class(fn)
    if isinstance(fn, nn.Module) and "eps" not in map(MEANING.get, parameters_of(fn.forward)):
        return of_module(fn)
    form = form_of(call) if call else _by_names(fn)
    if form is None:
        return fn
    missing = [name for name in ("x", "eps") if name not in form.names]
    if missing:
        raise Fault(
            f"{call or 'its call'} lacks {' and '.join(missing)}: give --call 'fn(out, x, w, eps)' as it is called"
        )
    names = tuple(name for name in ("x", "weight", "eps") if name in form.names)
    absent = [] if call else _may_be_left_out(fn)

    def function(
        *arguments: Any, residual: Tensor | None = None, gate: Tensor | None = None, alpha: float = 1.0,
        quant_scale: float = QUANT_SCALE, bias: Tensor | None = None, out: bool = False, apart: bool = False,
        over: bool = False,
    ) -> Any:  # fmt: skip
        values = dict(zip(names, arguments, strict=True)) | {"residual": residual, "gate": gate, "alpha": alpha}
        values |= _made(fn, form, values["x"], quant_scale, apart) | {
            name: None for name in absent if name != "out" or not out
        }
        values |= ({} if bias is None else {"bias": bias}) | ({"out": values["x"]} if over else {})
        made = _stored(form.call(fn, values), values["out"])
        if residual is not None and "residual_out" in form.names:
            made = (*(made if isinstance(made, tuple | list) else (made,)), values["residual_out"])
        scales = next((values[name] for name in ("quant_scale", "scales") if name in form.names), None)
        return made if scales is None or isinstance(made, tuple | list) else (made, scales)

    function.__name__ = getattr(fn, "__name__", "")  # which tells its kind
    if "residual_out" in form.names:
        function.sum_is = "is written into residual_out"  # type: ignore[attr-defined]
    return signed(function, names, _optional(fn, form) | {name: True for name in absent if name in form.names})


def _may_be_left_out(fn: Callable[..., Any]) -> list[str]:
    """Which of LEFT_OUT fn takes with None for a default."""
    there = [MEANING.get(name) for name, p in parameters_of(fn).items() if p.default is None]
    return [name for name in LEFT_OUT if there.count(name) == 1]


def _stored(result: Any, out: Tensor | None) -> Any:
    """What a call stored: result, or what it wrote to out and the rest of the result. Raises Fault where it returns
    another tensor than out, and leaves that as it is."""
    if out is None or not isinstance(result, Tensor | tuple | list):
        return result if out is None else out
    y, *rest = result if isinstance(result, tuple | list) else (result,)
    if isinstance(y, Tensor) and y.data_ptr() != out.data_ptr() and out.float().isnan().all():
        raise Fault(f"the callable returns a tensor and leaves as it is what was taken for an output: {EXAMPLE}")
    rest = rest if isinstance(y, Tensor) and y.shape == out.shape else [y, *rest]
    return (out, *rest) if rest else out


def _made(fn: Callable[..., Any], form: Form, x: Tensor, quant_scale: float, apart: bool) -> dict[str, Any]:
    """What a call is given besides: a bias of zeros, a scale, and what it may write to, which lies in memory as x does;
    apart: is contiguous, with room behind it, where a kernel that takes x's strides for its own ends."""
    eight = {"quant_scale", "scales"} & set(form.names)
    dtype = torch.int8 if "int8" in str(getattr(fn, "__name__", "")) else torch.float8_e4m3fn
    rows = [*x.shape[:-1], 1]
    out = x.new_full([4 * x.numel()], float("nan"))[: x.numel()].view(x.shape) if apart else like(x)
    out = torch.zeros(x.shape, dtype=dtype, device=x.device) if eight else out
    return {
        "out": out if "out" in form.names else None,
        "residual_out": like(x),
        "bias": torch.zeros(x.shape[-1], dtype=x.dtype, device=x.device),
        "quant_scale": torch.tensor([quant_scale], device=x.device),
        "scales": torch.full(rows, float("nan"), device=x.device),
        "shape": [x.shape[-1]],
    }


def _through_jax(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn, of JAX where its module imports that and not torch, as a function of tensors; any other as it is."""
    modules = {
        value.__name__ for value in getattr(inspect.unwrap(fn), "__globals__", {}).values() if inspect.ismodule(value)
    }
    if "torch" in modules or not any(name.partition(".")[0] == "jax" for name in modules):
        return fn

    def given(value: Any) -> Any:
        if isinstance(value, Tensor) and (not value.is_contiguous() or value.storage_offset()):
            raise Unasked("an array of JAX does not say how it lies in memory")
        return to_jax(value) if isinstance(value, Tensor) else value

    def function(*arguments: Any, **named: Any) -> Any:
        result = fn(*map(given, arguments), **{name: given(value) for name, value in named.items()})
        return tuple(map(from_jax, result)) if isinstance(result, tuple | list) else from_jax(result)

    function.__name__ = getattr(fn, "__name__", "")
    function.__signature__ = inspect.signature(fn)  # type: ignore[attr-defined]
    return function


def in_a_batch(box: BlackBox) -> BlackBox:
    """The same callable where it is given x, and what is shaped like it, as [1, T, D]."""

    def function(*arguments: Any, **named: Any) -> Any:
        def given(value: Any) -> Any:
            return value[None] if isinstance(value, Tensor) and value.ndim == 2 else value

        result = box.fn(*map(given, arguments), **{name: given(value) for name, value in named.items()})
        outputs = result if isinstance(result, tuple | list) else (result,)
        found = tuple(value[0] if isinstance(value, Tensor) and value.ndim == 3 else value for value in outputs)
        return found if isinstance(result, tuple | list) else found[0]

    made = copy.copy(box)
    made.fn, made.manners = functools.wraps(box.fn)(function), {"x": "is taken as [1, T, D] alone"}
    return made


def as_kind(fn: Callable[..., Any], kind: str, call: str = "") -> Callable[..., Any]:
    """fn as a callable of that kind is called. Raises Fault as adapted does, and for a chain with a call."""
    if call and kind in CHAINS:
        raise Fault(f"--call is for norms: kind {kind} is called {KINDS[kind].partition(' ->')[0]}, so wrap it in one")
    return {"qkv": by_keyword, "norm_linear": linear}[kind](fn) if kind in CHAINS else adapted(fn, call)


def by_keyword(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A chain as a function of kinds.KINDS, where it has all these arguments in another order."""
    fn = _through_jax(fn)
    parameters = parameters_of(fn)
    if not set(CHAIN) <= set(parameters) or tuple(parameters)[: len(CHAIN)] == CHAIN:
        return fn

    def function(*values: Any, **extra: Tensor) -> Any:
        return fn(**dict(zip(CHAIN, values, strict=True)), **extra)

    return _as_chain(function, parameters)


def _as_chain(function: Callable[..., Any], parameters: dict[str, inspect.Parameter]) -> Callable[..., Any]:
    """function with the signature of a chain, and those of the parameters that are optional."""
    kept = [p for name, p in parameters.items() if name in OPTIONAL["qkv"]]
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in CHAIN]
    more = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]
    function.__signature__ = inspect.Signature([*first, *more])  # type: ignore[attr-defined]
    return function


def linear(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A norm and a projection, with the numbers of heads behind eps or not, as a chain: q, k and v are parts of what it
    returns, and it is given no weights of head norms."""
    fn = _through_jax(fn)
    parameters = parameters_of(fn)
    heads = {"num_q_heads", "num_kv_heads"} <= set(parameters)

    def function(*values: Any, **extra: Tensor) -> Any:
        given = dict(zip(CHAIN, values, strict=True))
        hq, hkv, size = given["num_q_heads"], given["num_kv_heads"], len(given["q_norm_weight"])
        first = dict(zip(LINEAR, (values[i] for i in (0, 1, 2, 5)), strict=True))
        numbers = {"num_q_heads": hq, "num_kv_heads": hkv} if heads else {}
        named = set(LINEAR) <= set(parameters)
        result = fn(**first, **numbers, **extra) if named else fn(*first.values(), *numbers.values(), **extra)
        if isinstance(result, tuple | list) and len(result) >= 3:
            return result
        y, *more = result if isinstance(result, tuple | list) else (result,)
        if len(more) == 1 and "residual" in extra and _is_sum(y, values[0], extra["residual"]):
            y, more = more[0], [y]
        if not isinstance(y, Tensor) or y.shape[-1:] != given["qkv_weight"].shape[:1]:
            return result
        return (*y.split([hq * size, hkv * size, hkv * size], -1), *more)

    return _as_chain(function, parameters)


def _is_sum(value: Any, x: Tensor, residual: Tensor) -> bool:
    """Whether that is x, into which the sum was written, or x + residual in one of the ways in which sums are held."""
    if not isinstance(value, Tensor) or value.shape != x.shape:
        return False
    return value.data_ptr() == x.data_ptr() or Sums("bf16", RNE).is_one(value, totals(x, residual, None, "bf16"))


EXAMPLE = "give --call 'fn(out, x, w, eps)', with x, w, eps, residual, out and constants"


def form_of(call: str, meaning: dict[str, str] = MEANING, example: str = EXAMPLE) -> Form:
    """The form of `fn(out, x, w, eps)`, `fn(x, weight=w, epsilon=eps, inplace=False)`; fn and names of any meaning."""
    try:
        tree = ast.parse(call.strip(), mode="eval").body
    except SyntaxError:
        raise Fault(f"{call!r} is no call: {example}") from None
    if not isinstance(tree, ast.Call) or any(k.arg is None for k in tree.keywords):
        raise Fault(f"{call!r} is no call: {example}")

    weights = weights_in(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))

    def part(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id not in meaning:
                raise Fault(f"{call!r} has {node.id}, which is nothing that a norm takes: {example}")
            return Name(str(meaning_of(node.id, weights, meaning)))
        if isinstance(value := getattr(torch, ast.unparse(node).removeprefix("torch."), None), torch.dtype):
            return value
        with contextlib.suppress(ValueError):
            return ast.literal_eval(node)
        raise Fault(f"{call!r} has {ast.unparse(node)}, which is no constant: {example}")

    return Form(tuple(map(part, tree.args)), {str(k.arg): part(k.value) for k in tree.keywords})


def like(x: Tensor) -> Tensor:
    """NaN to be written to, that lie in memory as x does."""
    buffer = torch.full_like(x if x._base is None else x._base, float("nan"))
    return buffer.as_strided(x.size(), x.stride(), x.storage_offset())


def arguments(fn: Callable[..., Any]) -> list[tuple[str, bool, bool]]:
    """The names of fn's arguments, whether each has a default, and goes by its name alone; none where fn takes any."""
    scripted = isinstance(fn, torch.jit.ScriptFunction)
    fn = getattr(fn, "_opoverload", fn)  # of torch.library.custom_op
    if schema := fn.schema if scripted else getattr(getattr(fn, "default", fn), "_schema", None):
        return [(a.name, a.has_default_value(), a.kwarg_only) for a in schema.arguments]
    parameters = [p for p in parameters_of(fn).values() if p.kind is not p.VAR_KEYWORD]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return []
    return [(p.name, p.default is not p.empty, p.kind is p.KEYWORD_ONLY) for p in parameters]


def _by_names(fn: Callable[..., Any]) -> Form | None:
    """The form that the names of fn's arguments tell; None where it may be called (x, weight, eps). Raises Fault where
    it may not, and they do not tell how."""
    parts = arguments(fn)
    weights, absent = weights_in(name for name, _, _ in parts), _may_be_left_out(fn)
    told: list[tuple[str, str | None, bool, bool]] = []
    for name, default, named in parts:
        meaning = meaning_of(name, weights)
        again = meaning in [other for _, other, _, _ in told]  # `weights=None` beside `weight`
        again = again or (meaning in MADE and meaning not in absent)
        told.append((name, None if default and again else meaning, default, named))
    meanings = [meaning for _, meaning, _, _ in told]
    if not {"x", "eps"} <= set(meanings) or meanings.count("weight") > 1:
        return _unless_elsewhere(parts, meanings)
    plain = meanings[:3] == ["x", "weight", "eps"] and not any(named for _, _, _, named in told[:3])
    plain = plain and parts[0][0] in parameters_of(fn)  # else nobody but its schema tells what it takes
    if plain and all(name == "residual" or (default and meaning is None) for name, meaning, default, _ in told[3:]):
        return None
    if any(meaning is None and not default for _, meaning, default, _ in told):
        return _unless_elsewhere(parts, meanings)
    used = [(name, Name(str(meaning)), named) for name, meaning, default, named in told if meaning]
    skipped = any(meaning is None and not named for _, meaning, _, named in told)
    places = () if skipped else tuple(part for _, part, named in used if not named)
    return Form(places, {name: part for name, part, named in used if named or skipped})


def _unless_elsewhere(parts: list[tuple[str, bool, bool]], meanings: list[str | None]) -> None:
    """Raises Fault where a name that is known lies elsewhere than in a call (x, weight, eps)."""
    places = dict(zip(("x", "weight", "eps"), range(3), strict=True))
    if elsewhere := [i for i, meaning in enumerate(meanings) if meaning in places and places[meaning] != i]:
        unknown = [part[0] for part, meaning in zip(parts, meanings, strict=True) if not (meaning or part[1])]
        lacking = [name for name in ("x", "eps") if name not in meanings]
        what = "several of its names are a weight's" if not lacking else f"none is {' or '.join(lacking)}"
        what = f"{unknown[0]} is no name that is known" if unknown else what
        raise Fault(
            f"it takes ({', '.join(name for name, _, _ in parts)}): {what}, and {parts[elsewhere[0]][0]} is no "
            f"{('first', 'second', 'third')[places[str(meanings[elsewhere[0]])]]} argument: {EXAMPLE}"
        )


def _optional(fn: Callable[..., Any], form: Form) -> dict[str, bool]:
    """Which of NAMED the form has, a scale and a bias, and whether they may be left out."""
    defaults = {MEANING.get(name): p.default is not p.empty for name, p in parameters_of(fn).items()}
    defaults |= {MEANING.get(name): default for name, default, _ in arguments(fn)}
    made = {name: True for name in ("quant_scale", "bias") if name in form.names}
    made |= {"apart": True, "over": True} if "out" in form.names else {}
    return {name: defaults.get(name, False) for name in NAMED if name in form.names} | made
