"""The named plans: each with one line on what it is and who uses it.

Users are known by fingerprint (`castpoint study survey`), those behind `by source` from reading theirs or what they
say of it. A fingerprint shows the boundaries of a norm alone, not what a kernel does around its matmul.

To add one, add an entry to PLANS. Everything else (kernel, spec, Inductor version, tests, bench, plots)
takes its plans from here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from castpoint.kernels.plan import KEEP, RNE, RTZ, CastPlan


@dataclass(frozen=True)
class NamedPlan:
    plan: CastPlan
    about: str


HF_ROPE = {"unrotated": RNE, "cos_sin": RNE, "products": RNE}  # apply_rotary_pos_emb on bf16 tensors
HF = CastPlan(normed=RNE, proj=RNE, head_normed=RNE, **HF_ROPE)
ONE_ROUNDING = CastPlan(proj=RNE, unrotated=RNE)
FP32 = CastPlan(hidden=KEEP, matmul="fp32")

PLANS: dict[str, NamedPlan] = {
    "hf": NamedPlan(
        HF, "two roundings a norm: Hugging Face Qwen3, Qwen2, Llama run eagerly, Liger `llama`; by source vLLM in CUDA"
    ),
    "one-rounding": NamedPlan(
        ONE_ROUNDING,
        "one rounding a norm: F.rms_norm, Qwen3 and Llama under torch.compile, OLMo 2; by source FlashInfer, SGLang",
    ),
    "separate-head-norm": NamedPlan(
        ONE_ROUNDING.replace(head_normed=RNE, **HF_ROPE),
        "a fused norm + QKV kernel that stores bf16, then Hugging Face's own K norm as a kernel of its own",
    ),
    "bf16-operand": NamedPlan(
        CastPlan(), "what a fused kernel does by itself: bf16 operands, the fp32 accumulator kept through the head norm"
    ),
    "cast-after-matmul": NamedPlan(
        CastPlan(hidden=KEEP, matmul="tf32", proj=RNE),
        "the normed value enters the matmul as fp32 (Triton's default for fp32 is tf32) and is cast after it",
    ),
    "fp32-tf32": NamedPlan(
        CastPlan(hidden=KEEP, matmul="tf32"), "fp32 to the end, tensor cores in tf32: one rounding, at the store"
    ),
    "fp32-tf32x3": NamedPlan(
        CastPlan(hidden=KEEP, matmul="tf32x3"),
        "fp32 to the end, tf32 with the remainder added: near fp32 on tensor cores",
    ),
    "fp32": NamedPlan(FP32, "fp32 to the end, fp32 matmul: only what is stored is rounded (by source llama.cpp)"),
    "deferred": NamedPlan(
        CastPlan(scale="epilogue"), "by source FlashNorm, Mirage: rstd applied to the accumulator, after the matmul"
    ),
    "folded": NamedPlan(
        CastPlan(scale="folded", hidden=KEEP), "by source FlashNorm: w_in folded into W ahead of time and rounded once"
    ),
    "rstd-rounded": NamedPlan(
        ONE_ROUNDING.replace(rstd=RNE, head_rstd=RNE), "rstd itself in bf16: by source AMD IRON before its fix"
    ),
    "bf16-statistics": NamedPlan(
        HF.replace(statistics=RNE, variance=RNE, rstd=RNE, head_rstd=RNE),
        "a norm wholly in bf16, squares, variance and rstd too: the reference that flash-linear-attention ships",
    ),
    "truncating": NamedPlan(
        CastPlan(normed=RTZ, hidden=RTZ, proj=RTZ, head_normed=RTZ, unrotated=RTZ, cos_sin=RNE, products=RTZ, out=RTZ),
        "Hugging Face's order with truncation instead of nearest, by source in some ROCm kernels",
    ),
    "gemma": NamedPlan(
        ONE_ROUNDING.replace(weight_offset="fp32", **HF_ROPE),
        "Hugging Face Gemma 3, Liger `gemma`: weights stored as w - 1, 1 + w formed in fp32",
    ),
    "gemma-bf16-offset": NamedPlan(
        ONE_ROUNDING.replace(weight_offset="bf16-rne", **HF_ROPE),
        "Gemma with 1 + w formed in bf16, by source a bug of several engines",
    ),
}


def plan_named(name: str) -> CastPlan:
    """The plan of that name. Raises KeyError with the nearest name where there is none."""
    if name in PLANS:
        return PLANS[name].plan
    near = difflib.get_close_matches(name, PLANS, n=1, cutoff=0.3)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise KeyError(f"unknown plan {name!r}: {hint}plans are {', '.join(PLANS)}")
