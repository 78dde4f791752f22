"""How a norm takes its arguments: the forms that engines have, each made fn(x, weight, eps) of blackbox.KINDS.

Functions with other names or another order of arguments, with arguments by name alone, that write to `out` or in place;
torch.ops; modules and their classes, which hold weight and eps themselves. What a call leaves out keeps its default.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from triton.runtime.jit import KernelInterface

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.blackbox import KINDS, OPTIONAL

# What others call the arguments; `o` and `y` are outputs where they come before x, as in op(y, x, w, eps).
ALIASES = {
    "x": ("x", "X", "input", "inp", "hidden_states", "hidden", "inputs", "x_in"),
    "weight": ("weight", "w", "W", "gamma", "g", "weights", "norm_weight", "scale"),
    "eps": ("eps", "epsilon", "variance_epsilon", "norm_eps", "rms_norm_eps", "layer_norm_epsilon"),
    "residual": ("residual", "res", "residual_in", "skip", "R"),
    "out": ("out", "output", "result", "dst", "y", "Y", "o"),
}
CHAIN = tuple(KINDS["qkv"].partition("(")[2].partition(")")[0].split(", "))
MEANING = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


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
    if inspect.isclass(fn) and issubclass(fn, nn.Module):
        return _of_class(fn)
    if isinstance(fn, nn.Module) and "eps" not in map(MEANING.get, _parameters(fn.forward)):
        return _of_module(fn)
    form = form_of(call) if call else _by_names(fn)
    if form is None:
        return fn
    missing = [name for name in ("x", "weight", "eps") if name not in form.names]
    if missing:
        raise Fault(
            f"{call or 'its call'} lacks {' and '.join(missing)}: give --call 'fn(out, x, w, eps)' as it is called"
        )

    def function(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        out = _like(x) if "out" in form.names else None
        result = form.call(fn, {"x": x, "weight": weight, "eps": eps, "residual": residual, "out": out})
        return out if out is not None and not isinstance(result, Tensor | tuple | list) else result

    return _signed(function, "residual" in form.names, bool(_default(fn, form)))


def by_keyword(fn: Callable[..., Any]) -> Callable[..., Any]:
    """A chain as a function of blackbox.KINDS, where it has all these arguments in another order."""
    parameters = _parameters(fn)
    if not set(CHAIN) <= set(parameters) or tuple(parameters)[: len(CHAIN)] == CHAIN:
        return fn

    def function(*values: Any, **extra: Tensor) -> Any:
        return fn(**dict(zip(CHAIN, values, strict=True)), **extra)

    kept = [p for name, p in parameters.items() if name in OPTIONAL["qkv"]]
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in CHAIN]
    more = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept]
    function.__signature__ = inspect.Signature([*first, *more])  # type: ignore[attr-defined]
    return function


def form_of(call: str) -> Form:
    """The form of `fn(out, x, w, eps)`, `fn(x, weight=w, epsilon=eps, inplace=False)`; fn is any name."""
    example = "give --call 'fn(out, x, w, eps)', with x, w, eps, residual, out and constants"
    try:
        tree = ast.parse(call.strip(), mode="eval").body
    except SyntaxError:
        raise Fault(f"{call!r} is no call: {example}") from None
    if not isinstance(tree, ast.Call) or any(k.arg is None for k in tree.keywords):
        raise Fault(f"{call!r} is no call: {example}")

    def part(node: ast.expr) -> Any:
        if isinstance(node, ast.Name):
            if node.id not in MEANING:
                raise Fault(f"{call!r} has {node.id}, which is nothing that a norm takes: {example}")
            return Name(MEANING[node.id])
        with contextlib.suppress(ValueError):
            return ast.literal_eval(node)
        raise Fault(f"{call!r} has {ast.unparse(node)}, which is no constant: {example}")

    return Form(tuple(map(part, tree.args)), {str(k.arg): part(k.value) for k in tree.keywords})


def _like(x: Tensor) -> Tensor:
    """NaN to be written to, that lie in memory as x does."""
    buffer = torch.full_like(x if x._base is None else x._base, float("nan"))
    return buffer.as_strided(x.size(), x.stride(), x.storage_offset())


def _by_names(fn: Callable[..., Any]) -> Form | None:
    """The form that the names of fn's arguments tell; None where it may be called (x, weight, eps)."""
    if schema := getattr(getattr(fn, "default", fn), "_schema", None):
        parts = [(a.name, a.has_default_value(), a.kwarg_only) for a in schema.arguments]
    else:
        parameters = _parameters(fn).values()
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            return None
        parts = [(p.name, p.default is not p.empty, p.kind is p.KEYWORD_ONLY) for p in parameters]
    told = [(name, MEANING.get(name), default, named) for name, default, named in parts]
    told = [part for part in told if part[1] != "out" or not part[2]]  # what may be left out makes its own
    meanings = [meaning for _, meaning, _, _ in told]
    if not {"x", "weight", "eps"} <= set(meanings):
        return None
    plain = meanings[:3] == ["x", "weight", "eps"] and not any(named for _, _, _, named in told[:3])
    if plain and all(name == "residual" or (default and meaning is None) for name, meaning, default, _ in told[3:]):
        return None
    if any(meaning is None and not default for _, meaning, default, _ in told):
        return None
    used = [(name, Name(str(meaning)), named) for name, meaning, default, named in told if meaning]
    skipped = any(meaning is None and not named for _, meaning, _, named in told)
    places = () if skipped else tuple(part for _, part, named in used if not named)
    return Form(places, {name: part for name, part, named in used if named or skipped})


def _default(fn: Callable[..., Any], form: Form) -> bool:
    """Whether fn may be called without a residual."""
    return any(MEANING.get(name) == "residual" and p.default is not p.empty for name, p in _parameters(fn).items())


def _signed(function: Callable[..., Any], residual: bool, optional: bool) -> Callable[..., Any]:
    """function with the signature (x, weight, eps), and residual if it takes one, with a default if that may be left
    out."""
    default = None if optional else inspect.Parameter.empty
    parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("x", "weight", "eps")]
    if residual:
        parameters.append(inspect.Parameter("residual", inspect.Parameter.KEYWORD_ONLY, default=default))
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


# ---------------------------------------------------------------- modules


def _of_module(module: nn.Module) -> Callable[..., Any]:
    name = _weight_of(module)

    def function(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        with _with_eps(module, eps):
            arguments = (x,) if residual is None else (x, residual)
            return functional_call(module, {name: weight}, arguments)

    return _signed(function, "residual" in map(MEANING.get, _parameters(module.forward)), True)


def _of_class(kind: type[nn.Module]) -> Callable[..., Any]:
    """A module of the width and eps of each call: cls(width, eps=eps), as norms of transformers are made."""
    parameters = _parameters(kind)
    eps_name = next((name for name in parameters if MEANING.get(name) == "eps"), None)
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if eps_name is None or len(required) > 1:
        raise Fault(
            f"{kind.__name__} is a class that is made by ({', '.join(parameters)}), not by (width, eps=...): make one, "
            "and name it"
        )

    def function(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Any:
        module = kind(x.shape[-1], **{eps_name: eps})
        return _of_module(module.to(x.device))(x, weight, eps, **({} if residual is None else {"residual": residual}))

    return _signed(function, "residual" in map(MEANING.get, _parameters(kind.forward)), True)


def _weight_of(module: nn.Module) -> str:
    vectors = [name for name, value in module.named_parameters() if value.ndim == 1]
    if len(vectors) != 1:
        held = ", ".join(vectors) or "none"
        raise Fault(f"{type(module).__name__} holds {len(vectors)} weights of one dimension ({held}), a norm holds one")
    return vectors[0]


@contextlib.contextmanager
def _with_eps(module: nn.Module, eps: float) -> Iterator[None]:
    """The module with that eps, wherever it keeps its own."""
    name = next((name for name in ALIASES["eps"] if isinstance(getattr(module, name, None), float)), None)
    if name is None:
        raise Fault(f"{type(module).__name__} keeps no eps that can be set: {', '.join(ALIASES['eps'])}")
    own = getattr(module, name)
    setattr(module, name, eps)
    try:
        yield
    finally:
        setattr(module, name, own)


def _parameters(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """fn's parameters by their names, none where it does not tell."""
    try:
        return dict(inspect.signature(fn).parameters)
    except (TypeError, ValueError):
        return {}
