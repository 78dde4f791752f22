"""What the arguments of norms are called, and signatures for callables made of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

# What others call the arguments; `o` and `y` are outputs where they come before x, as in op(y, x, w, eps).
ALIASES = {
    "x": ("x", "X", "x1", "input", "inp", "hidden_states", "hidden", "inputs", "x_in"),
    "weight": ("weight", "w", "W", "gamma", "g", "weights", "norm_weight", "scale"),
    "eps": ("eps", "epsilon", "variance_epsilon", "norm_eps", "rms_norm_eps", "layer_norm_epsilon", "_eps"),
    "residual": ("residual", "res", "residual_in", "skip", "R", "x2"),
    "residual_out": ("residual_out", "res_out", "residual_output", "out_residual"),
    "out": ("out", "output", "result", "dst", "y", "Y", "o"),
    "bias": ("bias", "b", "B", "beta", "norm_bias"),
    "gate": ("gate", "z", "Z", "gates"),  # and g, where there is another weight
    "alpha": ("alpha", "residual_scale", "residual_multiplier", "residual_alpha"),
    "quant_scale": ("quant_scale", "input_scale", "static_scale", "scale_inv"),  # and scale, where there is a weight
    "shape": ("normalized_shape",),  # that of a row, as torch.nn.functional has it
    "scales": ("scales", "out_scale", "output_scale", "scales_out"),
}
# Which a callable that need not be given them is not given.
MADE = ("out", "bias", "quant_scale", "scales", "shape", "residual_out")
LEFT_OUT = ("bias", "out")  # of those, what it is asked without and with where its default is None
NAMED = ("residual", "gate", "alpha")  # which the caller says
MEANING = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


def weights_in(names: Iterable[str]) -> set[str]:
    """Which of the names may be the weight."""
    return {name for name in names if MEANING.get(name) == "weight"}


def meaning_of(name: str, weights: set[str], meaning: dict[str, str] = MEANING) -> str | None:
    """What an argument of that name is. `scale` is flax's weight, and beside a weight what is stored is divided by; `g`
    beside another one is a gate."""
    if name == "scale" and weights - {"scale"}:
        return "quant_scale"
    return "gate" if name == "g" and weights - {"g", "scale"} else meaning.get(name)


def signature_of(fn: Callable[..., Any]) -> inspect.Signature:
    """fn's signature, an empty one where it does not tell."""
    try:
        return inspect.signature(fn)
    except Exception:  # a signature may be the user's code
        return inspect.Signature()


def parameters_of(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """fn's parameters by their names, none where it does not tell."""
    return dict(signature_of(fn).parameters)


def options_of(fn: Callable[..., Any]) -> str:
    """What fn, or a module when it is called, takes besides and need not be given, with its default."""
    parameters = parameters_of(getattr(fn, "forward", fn)).values()
    left = set(MADE) - set(LEFT_OUT)
    told = (
        p.replace(annotation=p.empty)
        for p in parameters
        if p.default is not p.empty and MEANING.get(p.name, "residual_out") in left
    )
    return ", ".join(map(str, told))


def signed(function: Callable[..., Any], names: Iterable[str], optional: dict[str, bool]) -> Callable[..., Any]:
    """function with the signature of those names, and by name alone the others, with a default where they may be left
    out."""
    made = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    for name, may in optional.items():
        default = None if may else inspect.Parameter.empty
        made.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default))
    function.__signature__ = inspect.Signature(made)  # type: ignore[attr-defined]
    return function
