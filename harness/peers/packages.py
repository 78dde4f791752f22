"""Public implementations that are imported from their packages: PyTorch, transformers, Liger, flash-linear-attention,
flax. All of it is the packages' own code, except the rows called a formula: nano-vLLM is not on PyPI, and what JAX
ports of Hugging Face models share is a formula, not a package. Those are written here from the formula.

Optional packages are the extra `studies` of pyproject.toml; only `make` imports them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from castpoint.harness.peers.running import (
    COMPILE,
    EAGER,
    JIT,
    OP_BY_OP,
    TRITON,
    Bind,
    Implementation,
    Norm,
    by_triton,
    rows,
)

ONE, OFFSET = "one-rounding", "gemma"
WRITTEN_LIKE_LLAMA = ("hf", ONE)  # eager, and under torch.compile
# class: (package under transformers.models, right, right under torch.compile)
COMPILED = {
    "LlamaRMSNorm": ("llama", *WRITTEN_LIKE_LLAMA),
    "Qwen2RMSNorm": ("qwen2", *WRITTEN_LIKE_LLAMA),
    "Qwen3RMSNorm": ("qwen3", *WRITTEN_LIKE_LLAMA),
    "Olmo2RMSNorm": ("olmo2", ONE, ONE),
    "Gemma3RMSNorm": ("gemma3", OFFSET, OFFSET),
    "Gemma4RMSNorm": ("gemma4", ONE, ONE),  # not Gemma 3's: stores w, and takes a power of -1/2 instead of rsqrt
    "Qwen3_5RMSNorm": ("qwen3_5", OFFSET, OFFSET),  # not Qwen3's: stores w - 1
}
HEAD_NORMS = ("Qwen3RMSNorm", "Gemma3RMSNorm")  # OLMo 2 norms the whole projection at once, so that is an rmsnorm
EAGER_ONLY = {  # class: (package under transformers.models, right)
    "T5LayerNorm": ("t5", "hf"),  # an RMSNorm by another name: bf16 x * fp32 rstd is promoted
    "MistralRMSNorm": ("mistral", "hf"),
    "Phi3RMSNorm": ("phi3", "hf"),
    "DeepseekV3RMSNorm": ("deepseek_v3", "hf"),
    "MiniMaxRMSNorm": ("minimax", "hf"),
    "Llama4TextRMSNorm": ("llama4", "hf"),
    "GptOssRMSNorm": ("gpt_oss", ONE),
    "HeliumRMSNorm": ("helium", ONE),
    "MoshiRMSNorm": ("moshi", ONE),
    "GemmaRMSNorm": ("gemma", OFFSET),
    "Gemma2RMSNorm": ("gemma2", OFFSET),
    "CohereLayerNorm": ("cohere", "none: LayerNorm"),
}


def package_rows() -> list[Implementation]:
    """In the order of a table."""
    return [*_torch(), *_transformers(), *_jax(), *_triton()]


def _torch() -> list[Implementation]:
    function, module = partial(load_function, "torch.nn.functional"), partial(load_module, "torch.nn", "RMSNorm")
    layer_norm = partial(load_module, "torch.nn", "LayerNorm", bias=False)
    written = {"right": "hf", "compiled": ONE, "source": "nano-vllm layers/layernorm.py"}
    return [
        *rows("F.rms_norm", "torch", function, EAGER, *COMPILE, right=ONE, source="torch.nn.functional"),
        *rows("nn.RMSNorm", "torch", module, EAGER, *COMPILE, right=ONE, source="torch.nn"),
        *rows("nn.LayerNorm", "torch", layer_norm, EAGER, right="none: LayerNorm", source="torch.nn"),
        *rows("nano-vLLM's formula", "torch", load_nano_vllm, EAGER, *COMPILE, **written),
    ]


def _transformers() -> list[Implementation]:
    found = []
    for name, (model, right, compiled) in COMPILED.items():
        said = {"right": right, "source": f"modeling_{model}.py"}
        load = _of_model(model, name)
        found += rows(name, "transformers", load, EAGER, *COMPILE, compiled=compiled, **said)
        if name in HEAD_NORMS:
            found += rows(name, "transformers", load, EAGER, kind="head_norm", **said)
    for name, (model, right) in EAGER_ONLY.items():
        found += rows(name, "transformers", _of_model(model, name), EAGER, right=right, source=f"modeling_{model}.py")
    no_weight = partial(load_without_weight, "transformers.models.llama4.modeling_llama4", "Llama4TextL2Norm")
    said = {"right": "none: no weight is applied", "source": "modeling_llama4.py"}
    return [*found, *rows("Llama4TextL2Norm", "transformers", no_weight, EAGER, **said)]


def _of_model(model: str, name: str) -> Callable[[], Bind]:
    return partial(load_module, f"transformers.models.{model}.modeling_{model}", name)


def _jax() -> list[Implementation]:
    """flax multiplies rstd by the weight first. From 4096 rows on XLA for CPUs (jaxlib 0.10.2) makes one loop of the
    formula and leaves out its rounding of normed, which its optimised HLO still has, with and without excess precision:
    below it is hf, from there on one-rounding."""
    first, jit = f"{ONE}, order=x*(rstd*w)", "jax.jit"
    source = "flax linen/normalization.py"
    name, parts = "Hugging Face's formula in JAX", "none: with x [8193, 64] "
    return [
        *rows("flax.linen.RMSNorm, bf16", "flax", partial(load_linen, True), jit, right=first, source=source),
        *rows("flax.linen.RMSNorm, defaults", "flax", partial(load_linen, False), jit, right=f"{first}, hidden=fp32",
              source=source),
        *rows("flax.nnx.RMSNorm, bf16", "flax", load_nnx, jit, right=first, source="flax nnx/nn/normalization.py"),
        *rows(name, "jax", load_jax_formula, OP_BY_OP, right="hf", source="MaxText layers/normalizations.py"),
        *rows(name, "jax", load_jax_formula, *JIT, right=parts, source="its bits beside op by op, 4095 and 4096 rows"),
    ]  # fmt: skip


def _triton() -> list[Implementation]:
    fla, path, of_fla = "flash-linear-attention", "fla/modules/norm/layernorm.py", partial(load_module, "fla.modules")
    liger, ops = "liger-kernel", "liger_kernel/ops"
    transformed = partial(load_module, "liger_kernel.transformers")
    # PyTorch rounds a Python number to bf16 before it adds it to a bf16 tensor on a CPU
    wholly = "bf16-statistics, eps=bf16, root=1/sqrt"
    found = rows(f"{fla} rms_norm_ref", "fla-core", load_fla_reference, EAGER, right=wholly, source=path)
    for name, right in (("RMSNorm", ONE), ("LayerNorm", "none: LayerNorm")):
        found += rows(f"{fla} {name}", "fla-core", partial(of_fla, name), TRITON, right=right, source=path)
    gated = {"right": ONE, "source": "fla/modules/norm/layernorm_gated.py"}
    found += rows(f"{fla} rmsnorm_fn, no gate", "fla-core", load_fla_gated, TRITON, **gated)
    # in mode none tl.sum adds bf16 squares in bf16 (add.bf16), in an order of its own
    for mode, offset, right in (("llama", 0.0, "hf"), ("gemma", 1.0, OFFSET), ("none", 0.0, "none")):
        load, said = partial(load_liger, mode, offset), {"right": right, "source": f"{ops}/rms_norm.py"}
        found += rows(f"LigerRMSNorm, casting mode {mode}", liger, load, TRITON, **said)
        if right != "none":
            make = partial(by_triton, "LigerFusedAddRMSNorm", partial(load_liger_add, mode, offset))
            source = f"{ops}/fused_add_rms_norm.py"
            name, right = f"LigerFusedAddRMSNorm, casting mode {mode}", f"{right}, x=bf16-rne"
            found.append(Implementation(name, liger, "rmsnorm", TRITON, make, right, source))
    said = {"right": "none: LayerNorm", "source": f"{ops}/layer_norm.py"}
    found += rows("LigerLayerNorm", liger, partial(transformed, "LigerLayerNorm"), TRITON, **said)
    said = {"right": "none", "source": f"{ops}/poly_norm.py"}  # a polynomial of three norms
    return found + rows("LigerPolyNorm", liger, load_liger_poly, TRITON, **said)


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


def load_liger_add(casting_mode: str, offset: float) -> Norm:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> tuple[Tensor, Tensor]:
        return liger_fused_add_rms_norm(x, residual, weight, eps, offset, casting_mode, False)

    return norm


def load_liger_poly() -> Bind:
    """Of the weight only the first three are asked for, and no bias."""
    from liger_kernel.transformers.functional import liger_poly_norm

    return lambda width, eps: lambda x, weight: liger_poly_norm(x, weight[:3].clone(), weight.new_zeros(()), eps)


def load_without_weight(package: str, name: str) -> Bind:
    """A module class that has eps and no weight: what it is given goes nowhere."""
    module_class = getattr(importlib.import_module(package), name)
    return lambda width, eps: lambda x, weight: module_class(eps=eps)(x)


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


def load_fla_gated() -> Bind:
    from fla.modules.norm.layernorm_gated import rmsnorm_fn

    return lambda width, eps: lambda x, weight: rmsnorm_fn(x, weight, None, eps=eps)


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
