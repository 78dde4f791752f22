"""Any variant inside a transformers model, in place of input norm, q/k/v projection and q/k norm.

The input norm of each layer becomes the whole chain: it reads the residual stream and keeps q, k and v; the projections
behind it hand these on, and the q and k norms, which are in the chain already, do nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from castpoint.harness.problems.model_types import MODEL_TYPES, unsupported
from castpoint.harness.runs.errors import UserError
from castpoint.kernels.plan import KEEP, CastPlan
from castpoint.variants.backends import check_backend, run
from castpoint.variants.problem import Problem


def check_architecture(model_type: str) -> None:
    """Raises UserError for an architecture whose layers are built otherwise, or unknown."""
    if model_type not in MODEL_TYPES:
        raise UserError(unsupported(model_type))


def fitted(plan: CastPlan, model_type: str) -> CastPlan:
    """The plan for that architecture: where norm weights are stored as w - 1 (Gemma), a plan that does not say where
    1 + w is formed forms it in fp32, as Gemma does; RoPE stays the model's own. Raises UserError for a Gemma plan and
    any other model, and for a plan that stores fp32, which no bf16 model can read."""
    if plan.out == KEEP:
        raise UserError("a plan with out='fp32' stores float32, which the attention of a bf16 model does not read")
    plan = plan.without_rope()
    if MODEL_TYPES[model_type].weight_offset:
        return plan.replace(weight_offset=KEEP) if plan.weight_offset == "none" else plan
    if plan.weight_offset != "none":
        offset = " and ".join(name for name, kind in MODEL_TYPES.items() if kind.weight_offset)
        raise UserError(f"a plan that adds 1 to norm weights is for {offset}, not for {model_type}")
    return plan


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a transformers *ForCausalLM model."""
    return model.get_decoder().layers


def layer_problem(layer: nn.Module, config: object, x: Tensor) -> Problem:
    """The chain of that layer on x [T, D], with the layer's own weights."""
    attention = layer.self_attn
    projections = [attention.q_proj, attention.k_proj, attention.v_proj]
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Problem(
        x=x,
        norm_weight=layer.input_layernorm.weight,
        qkv_weight=torch.cat([p.weight for p in projections]),
        bias=None if projections[0].bias is None else torch.cat([p.bias for p in projections]),
        q_norm_weight=None if q_norm is None else q_norm.weight,
        k_norm_weight=None if k_norm is None else k_norm.weight,
        num_q_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        eps=config.rms_norm_eps,
        weight_offset=MODEL_TYPES[config.model_type].weight_offset,
        logit_scale=logit_scale(layer),
    )


def logit_scale(layer: nn.Module) -> float | None:
    """What that layer's attention multiplies q.k by; None: Dh^-1/2."""
    scale, usual = layer.self_attn.scaling, layer.self_attn.head_dim**-0.5
    return None if math.isclose(scale, usual) else float(scale)


@contextmanager
def attached(model: nn.Module, plan: CastPlan, backend: str = "eager") -> Iterator[None]:
    """Within the context the bf16 model computes every layer's q, k and v by that variant; behind it, by itself again.

    backend: one of variants.backends.BACKENDS. Raises UserError for an unsupported architecture or a plan that
    does not fit it, ValueError for weights that are not bf16.
    """
    check_backend(backend)
    config = model.config.get_text_config()
    check_architecture(config.model_type)
    plan = fitted(plan, config.model_type)
    if model.dtype != torch.bfloat16:
        raise ValueError(f"a variant needs a bfloat16 model, this one is {model.dtype}: load it with dtype=bfloat16")
    with replaced([change for layer in decoder_layers(model) for change in _changes(layer, config, plan, backend)]):
        yield


@contextmanager
def replaced(values: list[tuple[object, str, object]]) -> Iterator[None]:
    """Within it each attribute (owner, name, value) has that value, behind it its own again, a method its class's."""
    own = [(owner, name, getattr(owner, name)) for owner, name, _ in values]
    try:
        for owner, name, value in values:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in own:
            if getattr(value, "__self__", None) is owner:
                vars(owner).pop(name, None)
            else:
                setattr(owner, name, value)


def _changes(layer: nn.Module, config: object, plan: CastPlan, backend: str) -> list[tuple[object, str, object]]:
    """What the modules of that layer do instead of what they did."""
    attention, outputs = layer.self_attn, {}
    with torch.no_grad():
        problem = layer_problem(layer, config, layer.input_layernorm.weight[None])

    def chain(stream: Tensor) -> Tensor:
        """For the input norm: computes q, k and v of the residual stream [B, S, D], which it passes on."""
        values = run(plan, problem.replace(x=stream.flatten(0, -2)), backend)
        values = [value.to(stream.dtype).reshape(*stream.shape[:-1], -1) for value in values]
        outputs.update(zip("qkv", values, strict=True))
        return stream

    def take(name: str, stream: Tensor) -> Tensor:
        """For a projection: hands on what the chain has computed, [B, S, H * Dh], once."""
        return outputs.pop(name)

    takes = [(getattr(attention, f"{name}_proj"), "forward", partial(take, name)) for name in "qkv"]
    norms = [(getattr(attention, name), "forward", _same) for name in ("q_norm", "k_norm") if hasattr(attention, name)]
    return [(layer.input_layernorm, "forward", chain), *takes, *norms]


def _same(x: Tensor) -> Tensor:
    return x
