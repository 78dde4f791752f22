"""Plans that fit a model, and what is refused by its name before anything is attached."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import modules, reference_plan, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from castpoint.harness.model.attach import attached, check_architecture, fitted
from castpoint.harness.problems.model_types import MODEL_TYPES
from castpoint.variants.catalogue import plan_named

transformers.logging.set_verbosity_error()


def refusal(model: nn.Module, plan: object, backend: str = "eager") -> str:
    before = modules(model)
    with pytest.raises(ValueError) as caught, attached(model, plan, backend):
        pass
    assert modules(model) == before and "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_by_name() -> None:
    qwen3, hf = tiny_model("qwen3"), plan_named("hf")
    assert "out='fp32'" in refusal(qwen3, hf.replace(out="fp32"))
    assert "gemma3_text and gemma, not for qwen3" in refusal(qwen3, plan_named("gemma"))
    with pytest.raises(ValueError, match="'mamba': supported are qwen2, qwen3, qwen3_moe, llama, gemma3_text"):
        check_architecture("mamba")
    config = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8)
    assert "'gpt2'" in refusal(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), hf)
    wide = AutoModelForCausalLM.from_config(tiny_config("qwen3", 1), dtype=torch.float32)
    assert "bfloat16 model, this one is torch.float32" in refusal(wide, hf)


def test_an_unknown_backend_is_refused_at_the_door() -> None:
    assert "unknown backend 'cudnn': backends are spec" in refusal(tiny_model("qwen3"), plan_named("hf"), "cudnn")


def test_plans_are_fitted_to_gemma() -> None:
    assert fitted(plan_named("one-rounding"), "gemma3_text") == plan_named("gemma").without_rope()
    assert fitted(plan_named("gemma-bf16-offset"), "gemma3_text") == plan_named("gemma-bf16-offset").without_rope()
    assert fitted(plan_named("hf"), "qwen3") == plan_named("hf").without_rope()
    for kind in MODEL_TYPES:
        assert fitted(reference_plan(kind), kind) == reference_plan(kind)
