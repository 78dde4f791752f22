"""Yardsticks of a whole-model study: the model in a wider precision, an ulp on K, 4-bit weights. Each is a context
within which the bf16 model computes that way; behind it every bit of the model is as before."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from castpoint.harness.model.attach import decoder_layers, replaced
from castpoint.harness.model.language_model import norms
from castpoint.harness.model.passes import last_of, norm_offset


@contextmanager
def in_precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """The bf16 model with its weights widened to that dtype, arithmetic in it; for float64 the norms too, which
    transformers runs in float32, and experts one by one, since its grouped matmul has no float64. A router forms its
    probabilities in float32 here too, an error of 2^-24. Gemma's embedding scale stays the bf16 number that it was
    trained with."""
    scaled = [m for m in model.modules() if isinstance(getattr(m, "embed_scale", None), Tensor)]
    scales = [(module, "embed_scale", module.embed_scale.to(torch.bfloat16).to(dtype)) for module in scaled]
    exact: list[tuple[object, str, object]] = [
        (m, "forward", functools.partial(_float64_norm, m)) for m in norms(model) if dtype == torch.float64
    ]
    if dtype == torch.float64:
        experts = [module.config for module in model.modules() if hasattr(module, "is_transposed")]
        exact += [(config, "_experts_implementation", "eager") for config in experts]
    with replaced([*((weight, "data", weight.data.to(dtype)) for weight in model.parameters()), *scales, *exact]):
        yield


def _float64_norm(norm: nn.Module, x: Tensor) -> Tensor:
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (norm_offset(norm) + norm.weight)


@contextmanager
def one_ulp_on_k(model: nn.Module) -> Iterator[None]:
    """Every element of K, before its rotary embedding, one bf16 ulp up or down at random."""
    with ExitStack() as hooks:
        for number, layer in enumerate(decoder_layers(model)):
            hooks.enter_context(last_of(layer, "k").register_forward_hook(functools.partial(_one_ulp, number)))
        yield


def _one_ulp(seed: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    step = torch.randint(0, 2, output.shape, generator=rng, dtype=torch.int16).to(output.device) * 2 - 1
    moved = (output.contiguous().view(torch.int16) + step).view(torch.bfloat16)
    return torch.where(output == 0, output, moved)


def four_bit(model: nn.Module) -> Callable[[], AbstractContextManager[None]]:
    """A context in which every matrix of every layer went through ggml's Q4_0: 4 bits, a scale for 32 weights of a row.
    A router's keeps its bits, as in ggml."""

    @functools.cache  # by the first arm that needs it
    def quantised() -> list[tuple[object, str, object]]:
        import gguf  # here, so that the other yardsticks do not need it

        kind = gguf.GGMLQuantizationType.Q4_0

        def rounded(rows: Tensor) -> Tensor:
            blocks = gguf.quantize(rows.detach().float().cpu().contiguous().numpy(), kind)
            return torch.from_numpy(gguf.dequantize(blocks, kind)).to(rows)

        return [(w, "data", rounded(w.mT).mT if across else rounded(w)) for w, across in _matrices(model)]

    return lambda: replaced(quantised())


def _matrices(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    """Every matrix of every layer, and whether its rows lie in columns. Those of all experts lie in one tensor."""
    for module in decoder_layers(model).modules():
        if isinstance(module, nn.Linear):
            yield module.weight, False
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3:
                yield weight, getattr(module, "is_transposed", False)
