"""Arguments of a wrong kind, of every launcher: None, several in a row, NumPy, modules, codes without their scale,
tensors that hold nothing. Each is one line that names the argument, what it is and what would be right."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support import DEVICE, random_problem
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from castpoint.kernels.config import Config
from castpoint.kernels.head_norm import head_norm, qk_norm
from castpoint.kernels.main_loop import matmul
from castpoint.kernels.norm_qkv import fold_norm_weight, norm_qkv
from castpoint.kernels.plan import CastPlan
from castpoint.kernels.quantised import quantised_norm_qkv
from castpoint.variants.spec import with_table

FOLDED = CastPlan(hidden="fp32", scale="folded")


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


def given(launcher: str) -> dict[str, object]:
    """Arguments that this launcher takes."""
    problem = with_table(CastPlan(), random_problem(tokens=5, rope=True)).inputs()
    rope = {name: problem[name] for name in ("positions", "cos_sin_cache")}
    if launcher == "norm_qkv":
        return problem | {"bias": ones(128), "residual": ones(5, 200)}
    if launcher == "quantised_norm_qkv":
        packed = torch.zeros(128, 192 // 32 * 18, dtype=torch.uint8, device=DEVICE)
        changed = {"x": ones(5, 192), "norm_weight": ones(192), "bias": ones(128), "residual": ones(5, 192)}
        return {name: value for name, value in problem.items() if name != "qkv_weight"} | changed | {"packed": packed}
    if launcher == "head_norm":
        return {"proj": ones(5, 2, 32), "weight": ones(32), **rope}
    if launcher == "qk_norm":
        weights = {"q_norm_weight": ones(32), "k_norm_weight": ones(32)}
        return {"proj": ones(5, 3, 32), **weights, "num_q_heads": 2, **rope}
    if launcher == "fold_norm_weight":
        return {"qkv_weight": ones(128, 200), "norm_weight": ones(200), "plan": FOLDED}
    after = Config(prepass="hidden", block_k=256)
    return {"hidden": ones(5, 200), "weight": ones(128, 200), "head_dim": 32, "config": after}


LAUNCHERS: dict[str, Callable[..., object]] = {
    "norm_qkv": norm_qkv, "quantised_norm_qkv": quantised_norm_qkv, "head_norm": head_norm, "qk_norm": qk_norm,
    "fold_norm_weight": fold_norm_weight, "matmul": matmul,
}  # fmt: skip
TENSORS = [(launcher, name) for launcher in LAUNCHERS for name, v in given(launcher).items() if isinstance(v, Tensor)]
OPTIONAL = {"weight": ("head_norm",)} | dict.fromkeys(
    ("q_norm_weight", "k_norm_weight", "bias", "residual", "positions", "cos_sin_cache"), tuple(LAUNCHERS)
)


def says(launcher: str, **changed: object) -> str:
    """The one line with which that launcher refuses these arguments."""
    with pytest.raises(ValueError) as error:
        LAUNCHERS[launcher](**{**given(launcher), **changed})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_arguments_are_right_but_for_the_changes_below(launcher: str) -> None:
    LAUNCHERS[launcher](**given(launcher))


# ---------------------------------------------------------------- what is no plain tensor


def a_dtensor(tensor: Tensor) -> Tensor:
    """As a DTensor looks to a launcher: a wrapper without memory of its own."""
    wrapped = torch.Tensor._make_wrapper_subclass(
        DTensor, tensor.shape, dtype=tensor.dtype, layout=tensor.layout, device=tensor.device
    )
    wrapped._local_tensor = tensor
    return wrapped


NO_TENSORS = {  # what is made of a right tensor, and the words that the sentence holds
    "a tuple": (lambda t: (t, t), ["must be a tensor, not a tuple of 2: "]),
    "a list of numbers": (lambda t: t.flatten().tolist()[:3], ["must be a tensor, not a list of 3: torch.tensor("]),
    "an array": (lambda t: t.cpu().float().numpy(), ["must be a tensor, not a numpy array [", "torch.from_numpy("]),
    "a module": (lambda t: nn.Linear(2, 2), ["must be a tensor, not the module Linear: give its "]),
    "a string": (lambda t: "w", ["must be a tensor, not 'w'"]),
    "a number": (lambda t: np.float32(1), ["must be a tensor, not np.float32(1.0), a float32"]),
    "sparse": (lambda t: t.to_sparse(), ["is sparse (torch.sparse_coo): give ", ".to_dense()"]),
    "without memory": (lambda t: t.to("meta"), ["is on meta", "holds no elements"]),
    "a DTensor": (a_dtensor, ["is a DTensor, which wraps other tensors", ".to_local()"]),
}


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize(("launcher", "name"), TENSORS)
def test_what_is_no_plain_tensor(launcher: str, name: str, kind: str) -> None:
    make, words = NO_TENSORS[kind]
    said = says(launcher, **{name: make(given(launcher)[name])})
    assert said.startswith(f"{name} ") and all(word in said for word in words), said


@pytest.mark.parametrize(("launcher", "name"), TENSORS)
def test_none_is_refused_where_a_tensor_must_be(launcher: str, name: str) -> None:
    if launcher in OPTIONAL.get(name, ()):
        return
    said = says(launcher, **{name: None})
    assert said.startswith(f"{name} must be a tensor, not None"), said
    assert ("a norm without a weight takes ones" in said) == (name == "norm_weight")


PARTS = {
    "norm_weight": "the head norms' weights are q_norm_weight and k_norm_weight",
    "qkv_weight": "join them by rows with torch.cat, q, k, v",
    "packed": "join them by rows with torch.cat, q, k, v",
    "bias": "join them with torch.cat, q, k, v",
    "cos_sin_cache": "cos of Dh / 2 angles, then their sin, joined with torch.cat",  # Hugging Face: a pair
}


@pytest.mark.parametrize("name", PARTS)
def test_of_several_tensors_it_is_said_how_they_become_one(name: str) -> None:
    assert PARTS[name] in says("quantised_norm_qkv" if name == "packed" else "norm_qkv", **{name: [ones(4), ones(4)]})


# ---------------------------------------------------------------- types


CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32)


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize(("launcher", "name"), [pair for pair in TENSORS if pair[1] not in ("positions", "packed")])
def test_codes_are_dequantised_with_their_scale(launcher: str, name: str, dtype: torch.dtype) -> None:
    """`.to(torch.bfloat16)` would drop it. Whatever their shape: codes of 4 bits are packed into fewer columns."""
    tensor = given(launcher)[name]
    for codes in (tensor.to(dtype), tensor.flatten()[: tensor.numel() // 8].to(dtype)):
        said = says(launcher, **{name: codes})
        assert said.startswith(f"{name} is {dtype}, whose numbers mean nothing without their scale"), said
        assert f"({name}.float() * scale).to(torch.bfloat16)" in said and "convert it" not in said


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
def test_a_quantised_tensor_of_torch() -> None:
    codes = torch.quantize_per_tensor(torch.ones(128, 200), 0.1, 0, torch.qint8)
    assert "qkv_weight is torch.qint8" in (said := says("norm_qkv", qkv_weight=codes)) and "dequantize()" in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize(("launcher", "name"), [(a, b) for a, b in TENSORS if "weight" in b or b in ("x", "bias")])
def test_other_floats_are_converted(launcher: str, name: str, dtype: torch.dtype) -> None:
    said = says(launcher, **{name: given(launcher)[name].to(dtype)})
    assert said == f"{name} must be torch.bfloat16, not {dtype}: convert it with .to(torch.bfloat16)"


def test_a_conversion_that_loses_what_is_meant_is_not_advised() -> None:
    assert says("norm_qkv", norm_weight=ones(200, dtype=torch.complex64)).endswith("not torch.complex64")
    assert says("norm_qkv", norm_weight=ones(200, dtype=torch.bool)).endswith("not torch.bool")
    assert says("norm_qkv", positions=ones(5, dtype=torch.float32)).endswith("not torch.float32")
    assert says("norm_qkv", positions=ones(5, dtype=torch.int32)).endswith("convert it with .to(torch.int64)")


# ---------------------------------------------------------------- gradients


CONSTANT = ("positions", "cos_sin_cache", "packed")  # what no model trains
LAUNCHED = [(a, b) for a, b in TENSORS if a != "fold_norm_weight" and b not in CONSTANT]


@pytest.mark.parametrize(("launcher", "name"), LAUNCHED)
def test_a_gradient_is_not_lost_without_a_word(launcher: str, name: str) -> None:
    waiting = given(launcher)[name].clone().requires_grad_()
    said = says(launcher, **{name: waiting})
    assert said.startswith(f"{name} requires grad, and these kernels have no backward") and "no_grad()" in said
    with torch.no_grad():
        LAUNCHERS[launcher](**{**given(launcher), name: waiting})


# ---------------------------------------------------------------- numbers, plans, configs, outputs


OTHERS = {
    "heads in words": ("norm_qkv", {"num_q_heads": "2"}, "num_q_heads must be an int, not '2'"),
    "heads as a float": ("norm_qkv", {"num_q_heads": 2.0}, "num_q_heads must be an int, not 2.0"),
    "no number of heads": ("norm_qkv", {"num_kv_heads": None}, "num_kv_heads must be an int, not None"),
    "heads as a flag": ("quantised_norm_qkv", {"num_kv_heads": True}, "num_kv_heads must be an int, not True"),
    "heads of NumPy": ("qk_norm", {"num_q_heads": np.int64(2)}, "num_q_heads must be an int, not np.int64(2), a int64"),
    "a head size as a float": ("matmul", {"head_dim": 32.0}, "head_dim must be an int, not 32.0"),
    "no eps": ("head_norm", {"eps": None}, "eps must be a positive number (Qwen3 uses 1e-6), not None"),
    "eps as a flag": ("norm_qkv", {"eps": True}, "eps must be a positive number (Qwen3 uses 1e-6), not True"),
    "eps as a tensor": (
        "norm_qkv",
        {"eps": torch.full([50, 50], 1e-6)},
        "eps must be a positive number (Qwen3 uses 1e-6), not a tensor [50, 50] of torch.float32",
    ),
    "no plan": ("norm_qkv", {"plan": None}, "plan must be a CastPlan, such as CastPlan(proj='bf16-rne'), not None"),
    "a plan in words": ("fold_norm_weight", {"plan": "hf"}, "plan must be a CastPlan, such as CastPlan("),
    "a config in words": (
        "norm_qkv",
        {"config": "separate"},
        "config must be a Config, such as Config(kernel='separate'), or None, not 'separate'",
    ),
    "a config of Triton's": ("quantised_norm_qkv", {"config": {"BLOCK": 64}}, "config must be a Config, such as "),
    "no config": ("matmul", {"config": None}, "matmul is the loop of kernel='fused' after prepass='hidden'"),
    "one output for three": (
        "norm_qkv",
        {"out": ones(5, 4, 32)},
        "out must be a tuple (q, k, v) of tensors, or None, not a tensor [5, 4, 32] of torch.bfloat16",
    ),
    "two outputs for three": (
        "quantised_norm_qkv",
        {"out": (ones(5, 2, 32), ones(5, 1, 32))},
        "out must be a tuple (q, k, v) of tensors, or None, not a tuple of 2",
    ),
    "three outputs for two": ("qk_norm", {"out": [None] * 3}, "out must be a tuple (q, k) of tensors, or None, not "),
    "an output that is an array": (
        "head_norm",
        {"out": np.zeros((5, 2, 32))},
        "out must be a tensor, not a numpy array",
    ),
    "an output of another type": (
        "head_norm",
        {"out": ones(5, 2, 32, dtype=torch.float32)},
        "out must be torch.bfloat16, which the plan stores, not torch.float32: make it with that dtype",
    ),
    "a format in a list": ("quantised_norm_qkv", {"format": ["q4_0"]}, "format must be one of q4_0, q8_0, not a list"),
    "no format": ("quantised_norm_qkv", {"format": None}, "format must be one of q4_0, q8_0, not None"),
    "a tensor for the weight's word": (
        "quantised_norm_qkv",
        {"weight": ones(4)},
        "weight must be one of fp32, bf16-rne, bf16-rtz, not a tensor [4] of torch.bfloat16",
    ),
    "weights that are not packed": (
        "quantised_norm_qkv",
        {"packed": ones(128, 192)},
        "packed must be a contiguous torch.uint8 tensor [rows, bytes], not torch.bfloat16 [128, 192] of strides "
        "(192, 1): norm_qkv takes bf16 weights",
    ),
    "rows of packed weights": (
        "quantised_norm_qkv",
        {"packed": torch.zeros(130, 108, dtype=torch.uint8, device=DEVICE)},
        "packed has 130 rows, which do not divide into 4 heads",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_arguments(case: str) -> None:
    launcher, changed, sentence = OTHERS[case]
    assert says(launcher, **changed).startswith(sentence), says(launcher, **changed)


@pytest.mark.parametrize("field", ["block_m", "block_k", "num_stages", "splits"])
@pytest.mark.parametrize("value", ["64", 64.0, None, True])
def test_a_size_of_a_config_is_an_int(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be an int, not {value!r}$"):
        Config(**{field: value})
