"""A public implementation behind one signature, so that a probe can call any of them, and how each is run:

    norm(x, weight, eps) -> y      kind `rmsnorm`: x [T, D], weight [D]; kind `head_norm`: x [T, H, Dh], weight [Dh]

x and weight are bf16 tensors on the device given to `make`; y is bf16 or fp32, on the same device; eps is a number
that may change from call to call. Norms that add take `residual` besides. Weights go in as the implementation stores
them: one that stores w - 1 adds the 1 itself. A chain takes and returns what fingerprint.kinds.KINDS says of `qkv`.

Width and eps are constants inside most norms, as models hold them. torch.compile is called as models call it, without
`dynamic`: it compiles for the first shape, anew for the first other one, where sizes become variables, and then where
a constant, a size, a stride or a type asks for another kernel.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.environment import version, without_limits_of_dynamo

Norm = Callable[..., Any]
Bind = Callable[[int, float], Callable[..., Any]]  # (width, eps) -> function of (x, weight)
Load = Callable[[], Bind]  # imports the package

EAGER, OP_BY_OP, TRITON = "eager", "jax op by op", "triton"
COMPILE: dict[str, dict[str, Any] | None] = {  # how: options of torch.compile
    "torch.compile": None,
    "torch.compile, emulate_precision_casts": {"emulate_precision_casts": True},
}
JIT: dict[str, dict[str, Any] | None] = {  # how: compiler options of jax.jit; XLA allows excess precision by default
    "jax.jit": None,
    "jax.jit, no excess precision": {"xla_allow_excess_precision": False},
}
OWN = "castpoint"  # the package of what is written here from reports


@dataclass(frozen=True)
class Implementation:
    """One implementation, run in one way.

    make(device), with device `cpu` or `cuda`, returns the callable. It raises ImportError where a package is missing,
    JAX's GPU plugin included, and ValueError where Triton's kernels would be interpreted. On `cpu` they are compiled
    for sm_90 and their PTX is run.

    right: the answer that a fingerprint must give, written down from the source before it is asked, in the form that
    fingerprint.verdict reads. source: where that was read.
    """

    name: str
    package: str  # its name on PyPI; `torch` and `jax` for formulas of public code, OWN for what is written here
    kind: str  # of fingerprint.kinds.KINDS
    how: str  # EAGER, OP_BY_OP, TRITON or a key of COMPILE or JIT
    make: Callable[[str], Norm]
    right: str
    source: str


def rows(
    name: str, package: str, load: Load, *hows: str, right: str, source: str, kind: str = "rmsnorm", compiled: str = ""
) -> list[Implementation]:
    """An implementation that is bound to width and eps, once for each way to run it. compiled: what is right under
    torch.compile, which keeps in fp32 what is rounded and read again inside one kernel, where that is another."""
    rights = {"torch.compile": compiled or right}
    return [
        Implementation(name, package, kind, how, partial(_made, name, load, how), rights.get(how, right), source)
        for how in hows
    ]


def describe_versions(implementation: Implementation) -> str:
    """What it is and what it runs on, with versions: `transformers 5.23.0, torch 2.13.0+cpu`."""
    by_jax, by_triton = implementation.how in (OP_BY_OP, *JIT), implementation.how == TRITON
    runs_on = ("jax", "jaxlib") if by_jax else ("torch", "triton") if by_triton else ("torch",)
    package = () if implementation.package == OWN else (implementation.package,)
    packages = dict.fromkeys((*package, *runs_on))  # those whose version decides about bits
    return ", ".join(f"{package} {version(package) or 'not installed'}" for package in packages)


# ---------------------------------------------------------------- how they are run


def by_triton(name: str, load: Callable[[], Norm], device: str) -> Norm:
    """A norm that launches Triton kernels, made by load: with device `cpu` their PTX is run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(f"TRITON_INTERPRET=1 would interpret {name} and round bf16 wrongly: unset it")
    norm = load()
    return executed("sm_90")(norm) if device == "cpu" else norm


def _made(name: str, load: Load, how: str, device: str) -> Norm:
    """Implementation.make."""
    if how in (OP_BY_OP, *JIT):
        return _through_jax(load, how, device)
    if how == TRITON:
        return by_triton(name, lambda: bound_once(load()), device)
    bind = load()
    return bound_once((lambda width, eps: compiled(bind(width, eps), COMPILE[how])) if how in COMPILE else bind)


def _through_jax(load: Load, how: str, device: str) -> Norm:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take 3/4 of the GPU's memory
    import jax

    try:
        jax_device = jax.devices("cpu" if device == "cpu" else "gpu")[0]
    except RuntimeError as error:
        raise ImportError(f"jax has no backend for {device} here (for a GPU: jax[cuda13], jax[cuda12])") from error
    load_norm = load()

    def bind(width: int, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        function = load_norm(width, eps)
        if how != OP_BY_OP:
            function = jax.jit(function, compiler_options=JIT[how])
        return lambda x, weight: from_jax(function(to_jax(x, jax_device), to_jax(weight, jax_device))).to(x.device)

    return bound_once(bind)


def bound_once(bind: Bind) -> Norm:
    """The norm that binds each pair of width and eps it meets once."""
    bound = functools.cache(bind)

    def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        with torch.no_grad():
            return bound(weight.shape[0], eps)(x, weight)

    return norm


def compiled(function: Callable[..., Tensor], options: dict[str, Any] | None) -> Callable[..., Tensor]:
    """function through Inductor; many norms here share their source."""
    made = torch.compile(function, fullgraph=True, options=options)
    without_limits_of_dynamo()
    return made


def to_jax(tensor: Tensor, device: Any = None) -> Any:
    """A bf16, fp16 or fp32 tensor as a JAX array on that JAX device, bit for bit (a conversion by value could quieten a
    NaN)."""
    import jax
    import jax.numpy as jnp

    held = tensor.cpu().contiguous()
    values = held.view(torch.int16).numpy().view(jnp.bfloat16.dtype) if held.dtype == torch.bfloat16 else held.numpy()
    return jax.device_put(values, device)


def from_jax(array: Any) -> Tensor:
    """A bf16, fp16 or fp32 JAX array as a CPU tensor, bit for bit."""
    import numpy as np

    values = np.array(array)  # a copy: JAX's own memory is read-only
    if values.dtype in (np.float32, np.float16):
        return torch.from_numpy(values)
    return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
