"""Modules as callables fn(x, weight, eps): an instance gives way to the weight and eps of a call, a class makes one for
the width and eps of each."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.arguments import ALIASES, MEANING, NAMED, parameters_of, signed
from castpoint.harness.runs.errors import reason_of

WIDTH = 256  # of the module by which a class is known


def of_module(module: nn.Module) -> Callable[..., Any]:
    """Raises Fault for a module that holds several weights, or no eps."""
    name, bias = _weight_of(module)
    names = ("x", "weight", "eps") if name else ("x", "eps")

    own = len(_tensors(module)[name]) if name else None
    parameters = parameters_of(module.forward)
    named = {str(MEANING.get(own)): own for own in parameters if MEANING.get(own) in NAMED}

    others: dict[tuple[torch.Size, torch.dtype], Tensor] = {}  # in place of its own weight

    def function(*arguments: Any, **extra: Tensor) -> Any:
        x, *weights, eps = arguments
        held = {}
        if name:
            own_weight, key = _tensors(module)[name], (weights[0].shape, weights[0].dtype)
            if (own_weight.shape, own_weight.dtype) != key:
                own_weight = others.setdefault(key, torch.empty_like(weights[0]))
                held = {name: own_weight.requires_grad_(weights[0].requires_grad)}
            with torch.no_grad():
                own_weight.copy_(weights[0])  # as weights reach a module, which may count how often they did
        if bias:
            given = extra.pop("bias", None)
            held[bias] = x.new_zeros(x.shape[-1]) if given is None else given
        with _with_eps(module, eps), _of_its_width(own, x):
            return functional_call(module, held, (x,), {named[meaning]: value for meaning, value in extra.items()})

    optional = {meaning: parameters[own].default is not inspect.Parameter.empty for meaning, own in named.items()}
    return signed(function, names, optional | ({"bias": True} if bias else {}))


def of_class(kind: type[nn.Module]) -> Callable[..., Any]:
    """A module for each width and eps, cls(width, eps=eps), as norms of transformers are made."""
    parameters = parameters_of(kind)
    eps_name = next((name for name in parameters if MEANING.get(name) == "eps"), None)
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if eps_name is None or len(required) > 1:
        raise Fault(
            f"{kind.__name__} is a class that is made by ({', '.join(parameters)}), not by (width, eps=...): make one, "
            "and name it"
        )

    @functools.cache  # what it keeps of a weight shows when it is given another
    def made(width: int, eps: float, device: torch.device) -> Callable[..., Any]:
        return of_module(kind(width, **{eps_name: eps}).to(device))

    def function(x: Tensor, *rest: Any, **extra: Any) -> Any:
        return made(x.shape[-1], rest[-1], x.device)(x, *rest, **extra)

    try:
        one = kind(WIDTH, **{eps_name: 1e-6})
    except Exception as error:  # it is the user's code
        call = f"{kind.__name__}({WIDTH}, {eps_name}=1e-6)"
        raise Fault(f"{call} raised {reason_of(error)}: make one, and name it") from error
    function.__signature__ = inspect.signature(of_module(one))  # type: ignore[attr-defined]
    return function


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@contextlib.contextmanager
def _of_its_width(own: int | None, x: Tensor) -> Iterator[None]:
    """Within it, what a module raises for rows of another width than its own says how to ask for that."""
    try:
        yield
    except Exception as error:  # it is the user's code
        if own in (None, x.shape[-1]):
            raise
        way = f"{'--width' if x.ndim == 2 else '--head-dim'} {own}"
        raise RuntimeError(f"{error}; its own weight has {own} channels: give {way}") from error


def _weight_of(module: nn.Module) -> tuple[str, str]:
    """The name of its weight, a parameter or a buffer, empty where it holds an eps alone; that of its bias."""
    vectors = [name for name, value in module.named_parameters() if value.ndim == 1]
    vectors = vectors or [name for name, value in module.named_buffers() if value.ndim == 1]
    others = [name for name, value in {**vars(module), **_tensors(module)}.items() if isinstance(value, Tensor)]
    if not others and any(isinstance(getattr(module, name, None), float) for name in ALIASES["eps"]):
        return "", ""
    biases = [name for name in vectors if MEANING.get(name.rpartition(".")[2]) == "bias"] if len(vectors) == 2 else []
    vectors = [name for name in vectors if name not in biases or len(biases) > 1]
    if not vectors and others:
        raise Fault(f"{type(module).__name__} holds {others[0]}, which is no parameter or buffer of one dimension")
    if len(vectors) != 1:
        held = ", ".join(vectors) or "none"
        raise Fault(f"{type(module).__name__} holds {len(vectors)} weights of one dimension ({held}), a norm holds one")
    return vectors[0], "".join(biases)


@contextlib.contextmanager
def _with_eps(module: nn.Module, eps: float) -> Iterator[None]:
    """The module with that eps, wherever it, or one that it is made of, keeps its own."""
    places = [(part, name) for part in module.modules() for name in ALIASES["eps"] if hasattr(part, name)]
    own = [(part, name) for part, name in places if not isinstance(getattr(type(part), name, None), property)]
    kept = [(part, name, getattr(part, name)) for part, name in own if isinstance(getattr(part, name), float)]
    if not kept:
        why = f"keeps no eps that can be set: {', '.join(ALIASES['eps'])}"
        if places:
            part, name = places[0]
            why = f"has {name}={getattr(part, name)}: make it with a number"
        raise Fault(f"{type(module).__name__} {why}")
    for part, name, _ in kept:
        setattr(part, name, eps)
    try:
        yield
    finally:
        for part, name, eps_before in kept:
            setattr(part, name, eps_before)
