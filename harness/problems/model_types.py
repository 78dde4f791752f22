"""Model types of Hugging Face whose layers begin with the lab's chain, and the geometry that a config.json describes.

Read in transformers 5.24's modelling files, and held to its modules in tests: RMSNorm, then q_proj, k_proj and v_proj
of its output, then a norm of each head of q and k or none, then RoPE. What else a layer does (experts, sliding windows,
other pairs of RoPE, layers without it, multipliers of embedding and residual) is not of the chain.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import UnionType

from castpoint.harness.problems.geometry import Geometry
from castpoint.harness.runs.errors import UserError


@dataclass(frozen=True)
class ModelType:
    """What a model type has beside Llama's layer.

    defaults       keys that its config.json may leave out, as transformers' configuration class fills them
    head_norm      q and k are normed by head, before RoPE
    bias           of q, k and v: the key that says so, or always, or never
    weight_offset  norm weights are stored as w - 1
    multiplier     the key of what q.k is multiplied by; "": Dh^-1/2. query_pre_attn_scalar is that to the power of -1/2
    one_rounding   transformers' norm rounds once, behind its weight, and not before it too
    """

    defaults: dict[str, int | float | bool] = field(default_factory=dict)
    head_norm: bool = False
    bias: str | bool = "attention_bias"
    weight_offset: bool = False
    multiplier: str = ""
    one_rounding: bool = False


# Gemma 3's published configurations with vision rely on defaults; most others say all that is asked for here.
GEMMA3 = dict(
    hidden_size=2304, num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4, head_dim=256,
    query_pre_attn_scalar=256,
)  # fmt: skip
MULTIPLIED = {"attention_multiplier": 1.0}
MODEL_TYPES = {
    "qwen2": ModelType(bias=True),
    "qwen3": ModelType({"head_dim": 128}, head_norm=True),
    "qwen3_moe": ModelType({"num_key_value_heads": 4}, head_norm=True),
    "llama": ModelType(),
    "gemma3_text": ModelType(
        GEMMA3, head_norm=True, weight_offset=True, multiplier="query_pre_attn_scalar", one_rounding=True
    ),
    "arcee": ModelType({"rms_norm_eps": 1e-5}),
    "cwm": ModelType({"num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5}, bias=False),
    "dots1": ModelType(head_norm=True),
    "ernie4_5": ModelType({"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}, bias="use_bias"),
    "ernie4_5_moe": ModelType({"num_key_value_heads": 4, "rms_norm_eps": 1e-5}, bias="use_bias"),
    "gemma": ModelType({"num_key_value_heads": 16, "head_dim": 256}, weight_offset=True, one_rounding=True),
    "glm": ModelType(
        {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True},
    ),
    "glm4": ModelType(
        {"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1.5625e-7, "attention_bias": True},
    ),
    "gpt_oss": ModelType(
        {"num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5, "attention_bias": True}, one_rounding=True
    ),
    "granite": ModelType(MULTIPLIED, multiplier="attention_multiplier"),
    "granitemoe": ModelType(MULTIPLIED, multiplier="attention_multiplier"),
    "granitemoeshared": ModelType(MULTIPLIED, multiplier="attention_multiplier"),
    "ministral": ModelType({"num_key_value_heads": 8}, bias=False),
    "mistral": ModelType({"num_key_value_heads": 8}, bias=False),
    "mixtral": ModelType({"num_key_value_heads": 8, "rms_norm_eps": 1e-5}, bias=False),
    "qwen2_moe": ModelType({"num_key_value_heads": 16, "qkv_bias": True}, bias="qkv_bias"),
    "seed_oss": ModelType({"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True}),
    "smollm3": ModelType({"num_key_value_heads": 4}),
}

AFTER_ROPE = "norms q and k after RoPE"
NOT_BEFORE = "has no norm before its projections"
WHOLE_WIDTH = "norms k over all heads together"
LAYER_NORM = "norms by LayerNorm"
LATENT = "makes k of a compressed latent"
UNSUPPORTED = {
    "gemma2": "caps its attention logits",
    "phi3": "stores q, k and v in one tensor, qkv_proj",
    "glm4_moe": "rotates half of a head, where the lab's RoPE rotates all of it",
    "ministral3": "scales q by its position",
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "llama4", "llama4_text"), AFTER_ROPE),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), NOT_BEFORE),
    **dict.fromkeys(("olmoe", "minimax_m2"), WHOLE_WIDTH),
    **dict.fromkeys(("cohere", "cohere2", "nemotron", "olmo", "phi", "phimoe", "stablelm", "starcoder2"), LAYER_NORM),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "minicpm3"), LATENT),
}


def geometry_of(config: dict[str, object], origin: str) -> Geometry:
    """The geometry that a config.json describes. Raises UserError for another model type, or a size that is none."""
    if isinstance(config.get("text_config"), dict):  # with vision or sound: the text part is nested
        config = config["text_config"]
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(f"{origin} names the {unsupported(model_type)}")
    kind = MODEL_TYPES[model_type]
    values = kind.defaults | config  # null is no default: transformers takes it as it stands

    def positive(key: str, fallback: int | float | None = None, kinds: type | UnionType = int) -> int | float:
        value = fallback if values.get(key) is None else values[key]
        if not isinstance(value, kinds) or isinstance(value, bool) or value <= 0:
            raise UserError(f"{origin} must give {key} as a positive number, not {value!r}")
        return value

    hidden_size, heads = positive("hidden_size"), positive("num_attention_heads")
    head_dim = positive("head_dim", hidden_size // heads)
    scale = head_dim**-0.5
    if kind.multiplier:
        scale = positive(kind.multiplier, head_dim if "pre_attn" in kind.multiplier else 1.0, int | float)
        scale = scale**-0.5 if "pre_attn" in kind.multiplier else scale
    return Geometry(
        *(hidden_size, heads, positive("num_key_value_heads", heads), positive("num_hidden_layers")),
        head_dim=head_dim,
        eps=positive("rms_norm_eps", 1e-6, int | float),
        head_norm=kind.head_norm,
        bias=bool(values.get(kind.bias)) if isinstance(kind.bias, str) else kind.bias,
        weight_offset=kind.weight_offset,
        logit_scale=None if math.isclose(scale, head_dim**-0.5) else scale,
    )


def unsupported(model_type: object) -> str:
    """Why it is not one of MODEL_TYPES, as the end of a sentence, and which are."""
    why = UNSUPPORTED.get(str(model_type), "")
    return (
        f"unsupported model type {model_type!r}{f', which {why}' * bool(why)}: supported are {', '.join(MODEL_TYPES)}"
    )
