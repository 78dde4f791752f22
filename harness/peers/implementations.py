"""Public implementations of RMSNorm, each behind one signature, so that a probe can call any of them:

    norm(x, weight, eps) -> y      kind `rmsnorm`: x [T, D], weight [D]; kind `head_norm`: x [T, H, Dh], weight [Dh]

x and weight are bf16 tensors on the device given to `make`; y is bf16 or fp32, on the same device; eps is a number
that may change from call to call. No norm writes into its inputs. Weights go in as the implementation stores them: one
that stores w - 1 adds the 1 itself.

All of it is the packages' own code, except the rows called a formula: nano-vLLM is not on PyPI, and what JAX ports of
Hugging Face models share is a formula, not a package. Those are written here from the formula.

Width and eps are constants inside every norm, as models hold them, so torch.compile compiles anew for each pair and
shape (about a second on two cores). Given eps as an argument, torch 2.13 does the same; only with dynamic=True does
eps become an input of the kernel, in fp64, which on a CPU gave equal bits for four values of eps.

Optional packages are the extra `studies` of pyproject.toml; only `make` imports them.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from castpoint.harness.ptx.driver import executed
from castpoint.harness.runs.environment import version

Norm = Callable[[Tensor, Tensor, float], Tensor]
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
HUGGING_FACE = {  # class: package under transformers.models
    "LlamaRMSNorm": "llama",
    "Qwen2RMSNorm": "qwen2",
    "Qwen3RMSNorm": "qwen3",
    "Olmo2RMSNorm": "olmo2",
    "Gemma3RMSNorm": "gemma3",
    "Gemma4RMSNorm": "gemma4",  # not Gemma 3's: stores w, and takes a power of -1/2 instead of rsqrt
    "Qwen3_5RMSNorm": "qwen3_5",  # not Qwen3's: stores w - 1
}
HEAD_NORMS = ("Qwen3RMSNorm", "Gemma3RMSNorm")  # OLMo 2 norms the whole projection at once, so that is an rmsnorm


@dataclass(frozen=True)
class Implementation:
    """One implementation, run in one way.

    make(device), with device `cpu` or `cuda`, returns the norm. It raises ImportError where a package is missing, JAX's
    GPU plugin included, and ValueError where Triton's kernels would be interpreted. On `cpu` they are compiled for
    sm_90 and their PTX is run.
    """

    name: str
    package: str  # its name on PyPI; `torch` and `jax` for formulas written here
    kind: str  # `rmsnorm` or `head_norm`
    how: str  # EAGER, OP_BY_OP, TRITON or a key of COMPILE or JIT
    make: Callable[[str], Norm]


def implementations() -> list[Implementation]:
    """All of them, whether installed or not, in the order of a table. Imports no optional package."""
    modules = {name: f"transformers.models.{model}.modeling_{model}" for name, model in HUGGING_FACE.items()}
    models = {name: partial(load_module, module, name) for name, module in modules.items()}
    return [
        *_rows("F.rms_norm", "torch", partial(load_function, "torch.nn.functional"), EAGER, *COMPILE),
        *_rows("nn.RMSNorm", "torch", partial(load_module, "torch.nn", "RMSNorm"), EAGER, *COMPILE),
        *(row for name in models for row in _rows(name, "transformers", models[name], EAGER, *COMPILE)),
        *_rows("nano-vLLM's formula", "torch", load_nano_vllm, EAGER, *COMPILE),
        *(row for name in HEAD_NORMS for row in _rows(name, "transformers", models[name], EAGER, kind="head_norm")),
        *_rows("flash-linear-attention rms_norm_ref", "fla-core", load_fla_reference, EAGER),
        *_rows("LigerRMSNorm, casting mode llama", "liger-kernel", partial(load_liger, "llama", 0.0), TRITON),
        *_rows("LigerRMSNorm, casting mode gemma", "liger-kernel", partial(load_liger, "gemma", 1.0), TRITON),
        *_rows("LigerRMSNorm, casting mode none", "liger-kernel", partial(load_liger, "none", 0.0), TRITON),
        *_rows("flash-linear-attention RMSNorm", "fla-core", partial(load_module, "fla.modules", "RMSNorm"), TRITON),
        *_rows("FlagGems rms_norm", "flag-gems", partial(load_function, "flag_gems"), TRITON),
        *_rows("flax.linen.RMSNorm, bf16", "flax", partial(load_linen, True), "jax.jit"),
        *_rows("flax.linen.RMSNorm, defaults", "flax", partial(load_linen, False), "jax.jit"),
        *_rows("flax.nnx.RMSNorm, bf16", "flax", load_nnx, "jax.jit"),
        *_rows("Hugging Face's formula in JAX", "jax", load_jax_formula, OP_BY_OP, *JIT),
    ]


def _rows(name: str, package: str, load: Load, *hows: str, kind: str = "rmsnorm") -> list[Implementation]:
    return [Implementation(name, package, kind, how, partial(_made, name, load, how)) for how in hows]


def describe_versions(implementation: Implementation) -> str:
    """What it is and what it runs on, with versions: `transformers 5.23.0, torch 2.13.0+cpu`."""
    by_jax, by_triton = implementation.how in (OP_BY_OP, *JIT), implementation.how == TRITON
    runs_on = ("jax", "jaxlib") if by_jax else ("torch", "triton") if by_triton else ("torch",)
    packages = dict.fromkeys((implementation.package, *runs_on))  # those whose version decides about bits
    return ", ".join(f"{package} {version(package) or 'not installed'}" for package in packages)


# ---------------------------------------------------------------- how they are run


def _made(name: str, load: Load, how: str, device: str) -> Norm:
    """Implementation.make."""
    if how in (OP_BY_OP, *JIT):
        return _through_jax(load, how, device)
    if how == TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError(f"TRITON_INTERPRET=1 would interpret {name} and round bf16 wrongly: unset it")
    bind = load()
    norm = bound_once((lambda width, eps: compiled(bind(width, eps), COMPILE[how])) if how in COMPILE else bind)
    return executed("sm_90")(norm) if how == TRITON and device == "cpu" else norm  # PTX run here


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
    """function through Inductor, a graph for each shape.

    Dynamo counts what it compiled for a piece of source, and many norms here share theirs. Past 256 in all (and past
    8 that it takes for one function) it gives up: with fullgraph by an error, else by running uncompiled.
    """
    torch._dynamo.config.recompile_limit = max(1024, torch._dynamo.config.recompile_limit)
    torch._dynamo.config.accumulated_recompile_limit = max(8192, torch._dynamo.config.accumulated_recompile_limit)
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


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


# ---------------------------------------------------------------- what they are


def load_module(package: str, name: str, **options: Any) -> Bind:
    """A module class with those options: its forward with the given weight in place of its own parameter."""
    module_class = getattr(importlib.import_module(package), name)

    def bind(width: int, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        module = module_class(width, eps=eps, **options)
        return lambda x, weight: functional_call(module, {"weight": weight}, (x,))

    return bind


def load_liger(casting_mode: str, offset: float) -> Bind:
    """Offset 1 with mode `gemma` is what Liger gives to Gemma models, whose weights are stored as w - 1."""
    package = "liger_kernel.transformers.rms_norm"
    return load_module(package, "LigerRMSNorm", offset=offset, casting_mode=casting_mode)


def load_function(package: str) -> Bind:
    """The package's rms_norm, which takes what F.rms_norm takes."""
    rms_norm = importlib.import_module(package).rms_norm
    return lambda width, eps: lambda x, weight: rms_norm(x, [width], weight, eps)


def load_nano_vllm() -> Bind:
    """RMSNorm of GeeeekExplorer/nano-vllm (layers/layernorm.py), which multiplies in place and compiles the whole."""

    def bind(width: int, eps: float) -> Callable[[Tensor, Tensor], Tensor]:
        def norm(x: Tensor, weight: Tensor) -> Tensor:
            wide = x.float()  # a copy, since x is bf16
            wide.mul_(torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
            return wide.to(x.dtype).mul_(weight)

        return norm

    return bind


def load_fla_reference() -> Bind:
    """The PyTorch reference that flash-linear-attention ships, as it is called by default: all of it in x's dtype."""
    from fla.modules.norm.layernorm import rms_norm_ref

    return lambda width, eps: lambda x, weight: rms_norm_ref(x, weight, None, eps=eps)


def load_linen(bf16: bool) -> Bind:
    """flax.linen with dtype and parameters in bf16; or as it is by default, with fp32 parameters and an fp32 result.

    Either way x * (rstd * weight) in fp32. The dtype decides about the last rounding alone, the parameters' type, for
    weights that are bf16 values, about nothing: so bf16 stands for fp32 parameters under dtype=bf16 too.
    """
    import jax.numpy as jnp
    from flax import linen

    dtypes = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16} if bf16 else {}

    def bind(width: int, eps: float) -> Callable[[Any, Any], Any]:
        module = linen.RMSNorm(epsilon=eps, **dtypes)
        return lambda x, weight: module.apply({"params": {"scale": weight.astype(module.param_dtype)}}, x)

    return bind


def load_nnx() -> Bind:
    """flax.nnx with dtype and parameters in bf16; built while it is traced, where no older module may be changed."""
    import jax.numpy as jnp
    from flax import nnx

    def bind(width: int, eps: float) -> Callable[[Any, Any], Any]:
        def norm(x: Any, weight: Any) -> Any:
            options = {"epsilon": eps, "dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
            return nnx.RMSNorm(width, scale_init=lambda key, shape, dtype: weight, **options)(x)

        return norm

    return bind


def load_jax_formula() -> Bind:
    """weight * bf16(x * rstd), statistics in fp32: Llama's norm as MaxText and other ports to JAX have it.

    XLA may drop the inner rounding as excess precision, by default. It is reported to on GPUs (openxla/xla #41605);
    jaxlib 0.10.2 keeps it on CPUs with the option on and off.
    """
    import jax
    import jax.numpy as jnp

    def bind(width: int, eps: float) -> Callable[[Any, Any], Any]:
        def norm(x: Any, weight: Any) -> Any:
            wide = x.astype(jnp.float32)
            rstd = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
            return weight * (wide * rstd).astype(x.dtype)

        return norm

    return bind
