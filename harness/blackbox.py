"""A callable under test: called with copies, watched, and held to its contract."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KINDS = {
    "rmsnorm": "fn(x, weight, eps) -> y; x, y [T, D]",
    "head_norm": "fn(x, weight, eps) -> y; x, y [T, H, Dh]",
    "qkv": "fn(x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight, eps, num_q_heads, num_kv_heads) -> (q, k, v)",
}


class Fault(ValueError):
    """What a callable did against its contract, in one sentence."""


class BlackBox:
    """fn of one of KINDS on a device. Its optional arguments `residual` and `bias` are given where it has them.

    Every call raises Fault if fn raises, returns another shape or dtype, or writes into its inputs.
    """

    def __init__(self, fn: Callable[..., Any], kind: str, device: str = "cpu") -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        if not callable(fn):
            raise ValueError(f"{fn!r} is not callable, expected {KINDS[kind]}")
        self.fn, self.kind, self.device = fn, kind, device

    def takes(self, name: str) -> bool:
        """Whether fn has an argument of that name."""
        try:
            return name in inspect.signature(self.fn).parameters
        except (TypeError, ValueError):
            return False

    def norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
        """y for x of any shape [..., D], fp32 values that bf16 holds; bf16 or fp32 on the CPU."""
        extra = {} if residual is None else {"residual": self._given(residual)}
        (y,) = self._call([self._given(x), self._given(weight), eps], extra, [list(x.shape)])
        return y

    def qkv(
        self, x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor,
        eps: float, num_q_heads: int, num_kv_heads: int, residual: Tensor | None = None, bias: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """q [T, Hq, Dh], k and v [T, Hkv, Dh], on the CPU."""
        tensors = [self._given(t) for t in (x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight)]
        optional = {"residual": residual, "bias": bias}
        extra = {name: self._given(value) for name, value in optional.items() if value is not None}
        shapes = [[len(x), heads, len(q_norm_weight)] for heads in (num_q_heads, num_kv_heads, num_kv_heads)]
        return self._call([*tensors, eps, num_q_heads, num_kv_heads], extra, shapes)

    def _given(self, value: Tensor) -> Tensor:
        return value.to(torch.bfloat16).contiguous().to(self.device)

    def _call(self, arguments: list[Any], extra: dict[str, Tensor], shapes: list[list[int]]) -> tuple[Tensor, ...]:
        tensors = [*(a for a in arguments if isinstance(a, Tensor)), *extra.values()]
        before = [tensor.clone() for tensor in tensors]
        try:
            with torch.no_grad():
                result = self.fn(*arguments, **extra)
        except (Exception, SystemExit) as error:  # whatever the callable raises is its verdict
            raise Fault(f"the callable raised {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
        if any(not torch.equal(a, b) for a, b in zip(before, tensors, strict=True)):
            raise Fault("the callable writes into its inputs: give it copies")
        outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
        if self.kind != "qkv":
            outputs = outputs[:1]  # (y, x + residual) of a fused add
        self._check(outputs, shapes)
        return tuple(output.detach().cpu().clone() for output in outputs)  # it may use the same buffer again

    def _check(self, outputs: tuple[Any, ...], shapes: list[list[int]]) -> None:
        if len(outputs) != len(shapes) or not all(isinstance(output, Tensor) for output in outputs):
            kinds = ", ".join(type(output).__name__ for output in outputs)
            raise Fault(f"the callable returned ({kinds}), expected {KINDS[self.kind]}")
        for output, shape in zip(outputs, shapes, strict=True):
            if output.layout != torch.strided or output.is_meta:
                raise Fault(
                    f"the callable returned a {'meta' if output.is_meta else 'sparse'} tensor, expected a dense one"
                )
            if list(output.shape) != shape:
                raise Fault(f"the callable returned shape {list(output.shape)}, expected {shape}")
            if output.dtype not in (torch.bfloat16, torch.float32) or output.dtype != outputs[0].dtype:
                raise Fault(
                    f"the callable returned {output.dtype}, expected torch.bfloat16 or torch.float32 throughout"
                )
            wrong = 1 - output.isfinite().double().mean().item()
            if wrong:
                raise Fault(f"the callable returned NaN or infinity for {wrong:.2%} of the elements of finite inputs")


def load(target: str) -> Callable[..., Any]:
    """The callable of MODULE:FUNCTION; MODULE is a dotted name, importable from here, or the path of a .py file.

    Raises Fault if it cannot be imported or is no callable.
    """
    module_name, _, attribute = target.rpartition(":")
    if not module_name or not attribute:
        raise Fault(f"{target!r} is not MODULE:FUNCTION, such as my_kernels.norm:rms_norm or norm.py:rms_norm")
    try:
        if module_name.endswith(".py"):
            value: Any = _from_file(Path(module_name))
        else:
            sys.path.insert(0, "")
            value = importlib.import_module(module_name)
        for name in attribute.split("."):
            value = getattr(value, name)
    except Exception as error:  # user code runs on import and may raise anything
        text = " ".join(str(error).split())[:300]
        raise Fault(f"{target} cannot be imported: {type(error).__name__}: {text}") from error
    if not callable(value):
        raise Fault(f"{target} is of type {type(value).__name__}, which cannot be called")
    return value


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module
