"""A callable under test: called with copies, watched, and held to its contract."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.arguments import NAMED, signature_of
from castpoint.harness.fingerprint.stores import EIGHT_BITS, spread
from castpoint.harness.fingerprint.sums import INTO_RESIDUAL, Sums
from castpoint.kernels.plan import KEEP

KINDS = {
    "rmsnorm": "fn(x, weight, eps) -> y; x, y [T, D]",
    "head_norm": "fn(x, weight, eps) -> y; x, y [T, H, Dh]",
    "qkv": "fn(x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight, eps, num_q_heads, num_kv_heads) -> (q, k, v)",
    "norm_linear": "fn(x, norm_weight, weight, eps) -> y; x [T, D], weight [N, D], y [T, N]",
    "qk_norm_rope": "fn(q, k, q_weight, k_weight, cos, sin, eps) -> (q, k); q [T, Hq, Dh], k [T, Hkv, Dh]",
}
CHAINS = ("qkv", "norm_linear")
OF_HEADS = re.compile(r"(?:^|_)(?:(?<!lm_)head|heads|headwise|headnorm|(?:q|k|v|qk)_norm)(?:_|$|\W)")  # in a name


def guessed_kind(fn: Callable[..., Any]) -> str:
    """The kind whose arguments fn takes. Both norms take the same three: `head` in a name makes it a head norm.

    Raises Fault where it takes those of none, or of norms and chains alike.
    """
    names = [getattr(fn, "__name__", ""), *_parameters(fn)]
    norm, chain = (_takes(fn, KINDS[kind].partition(")")[0].count(",") + 1) for kind in ("rmsnorm", "qkv"))
    norm = norm or weightless(fn)
    linear = _takes(fn, 6 if "num_q_heads" in names else 4)
    if not chain and linear and all("w" in name.lower() for name in names[2:4]) and names[4][:3] == "eps":
        return "norm_linear"
    if norm and chain and any("qkv" in name for name in names):
        norm = False
    if norm == chain:
        said = f"its arguments ({', '.join(names[1:])}) do not tell its kind: give --kind, {' or '.join(KINDS)}, or "
        raise Fault(f"{said}for a norm --call 'fn(x, w, eps)' as it is called")
    if chain:
        return "qkv"
    return "head_norm" if any(map(OF_HEADS.search, names)) else "rmsnorm"


def _parameters(fn: Callable[..., Any]) -> list[str]:
    """fn's parameters without annotations, as far as it tells them."""
    return [str(p.replace(annotation=inspect.Parameter.empty)) for p in signature_of(fn).parameters.values()]


def _takes(fn: Callable[..., Any], count: int) -> bool:
    """Whether fn can be called with so many arguments by position, beside those of NAMED that it must have, and has
    names for them."""
    signature = signature_of(fn)
    named = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    try:
        bound = signature.bind(*range(count), **{name: None for name in named if name in NAMED})
    except TypeError:
        return False
    return not any(signature.parameters[name].kind == inspect.Parameter.VAR_POSITIONAL for name in bound.arguments)


def weightless(fn: Callable[..., Any]) -> bool:
    """Whether fn is a norm (x, eps)."""
    return list(signature_of(fn).parameters)[:2] == ["x", "eps"] and not _takes(fn, 3)


OPTIONAL = (
    {"rmsnorm": ("residual", "gate"), "head_norm": ("residual", "gate")}
    | dict.fromkeys(CHAINS, ("residual", "bias"))
    | {"qk_norm_rope": ()}
)


def paths(fn: Callable[..., Any], kind: str) -> list[tuple[str, ...]]:
    """Which of OPTIONAL fn is called with: what it must have, and that with each of the others by itself."""
    parameters = signature_of(fn).parameters
    there = [name for name in OPTIONAL[kind] if name in parameters]
    must = tuple(name for name in there if parameters[name].default is inspect.Parameter.empty)
    return [must, *((*must, name) for name in there if name not in must)]


def laid_out(value: Tensor, layout: str) -> Tensor:
    """value, contiguous, as a view of a larger buffer whose other elements are numbers like its own."""
    if layout == "contiguous":
        return value
    if layout in ("rows of a packed buffer", X_ALONE):  # as k in what a qkv projection returns
        buffer = torch.cat([value.roll(1, 0), value, value.roll(1, 0)], dim=1)
        return buffer.narrow(1, value.shape[1], value.shape[1])
    if layout == ROOM:
        return torch.cat([value.flatten()] * 4)[: value.numel()].view(value.shape)
    if layout == "an offset of one element":
        return torch.cat([value.flatten()[-1:], value.flatten()])[1:].view(value.shape)
    if layout == "heads before tokens in memory":
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels apart":  # the last stride is not one
        return torch.stack([value, value.roll(1, 0)], dim=-1)[..., 0]
    raise ValueError(layout)


X_ALONE = "x alone as rows of a packed buffer"
ROOM = "room behind it"  # of a contiguous residual then, where a kernel that takes x's strides for its own ends


class Refused(Fault):
    """The callable raised an exception instead of an answer."""


class Unasked(Fault):
    """What the way to a callable cannot carry: a layout in memory, through a file."""


class Pending(Exception):
    """Calls have no answer yet: what comes next depends on them."""


@dataclass(frozen=True)
class Way:
    """How calls reach a callable. files: as files, which hold no layout in memory. settle: where answers come in
    rounds, raises Pending if a call so far has none; such a call returns numbers that mean nothing."""

    files: bool = False
    settle: Callable[[], None] | None = None


DIRECT = Way()


@dataclass(frozen=True, eq=False)
class Stored:
    """What a norm stored: y, and where that has 8 bits, what each element was divided by."""

    y: Tensor
    scales: Tensor | None = None


class BlackBox:
    """fn of one of KINDS on a device, with those of its OPTIONAL arguments that are given, zero unless the caller says
    otherwise.

    Every call raises Fault if fn raises (Refused), returns another shape or dtype, or writes into its inputs. A norm
    may write y into x, and both may write x + residual into residual, or return it last. Of kind qkv q, k and v may be
    flat, [T, heads * Dh]. A norm_linear is called as a chain, by forms.linear.
    """

    def __init__(
        self, fn: Callable[..., Any], kind: str, device: str = "cpu", given: tuple[str, ...] | None = None,
        dtype: str = "bf16", way: Way = DIRECT,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
        if not callable(fn):
            raise ValueError(f"{fn!r} is not callable, expected {KINDS[kind]}")
        self.fn, self.kind, self.device = fn, kind, device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
        self.weight_dtype = torch.float16 if dtype == "fp16" else torch.bfloat16
        self.narrow = "fp16" if dtype == "fp16" else "bf16"
        self.given, self.way = paths(fn, kind)[0] if given is None else given, way
        self.weightless = kind not in CHAINS and weightless(fn)
        self.a_weight_a_head = False  # whether a head norm is given weights [H, Dh]
        self.manners: dict[str, str] = {}  # what it does with its inputs, in words
        self.sums = Sums(self.narrow, KEEP if dtype == "fp32" else f"{self.narrow}-rne")

    def takes(self, name: str) -> bool:
        """Whether fn is given an argument of that name."""
        return name in self.given

    @property
    def in_rounds(self) -> bool:
        """Whether answers come in rounds: what does not depend on an answer is asked before settle."""
        return self.way.settle is not None

    def settle(self) -> None:
        """Raises Pending where a call so far has no answer yet."""
        if self.way.settle is not None:
            self.way.settle()

    def norm(
        self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, layout: str = "contiguous",
        finite: bool = True, weight_dtype: torch.dtype | None = None, **more: Any,
    ) -> Stored:  # fmt: skip
        """y for x of any shape [..., D], fp32 values that bf16 holds; bf16 or fp32 on the CPU. weight [D], or with a
        weight a head [H, D]. layout: how x, and with an offset the weight, lie in memory. finite: y must be. more: what
        fn is given by name besides."""
        extra = self._extra(layout, residual=torch.zeros_like(x) if residual is None else residual)
        weights = []
        if not self.weightless:
            weight = weight.expand(x.shape[-2], -1) if self.a_weight_a_head else weight
            weight_layout = layout if "offset" in layout else "contiguous"
            weights = [self.as_given(weight, weight_layout, weight_dtype or self.weight_dtype)]
        arguments = [self.as_given(x, layout, self.dtype), *weights, eps]
        y, *scales = self._call(arguments, extra | more, [list(x.shape)], finite)
        return Stored(y, *scales)

    def qkv(
        self, x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor,
        eps: float, num_q_heads: int, num_kv_heads: int, residual: Tensor | None = None, bias: Tensor | None = None,
        layout: str = "contiguous", finite: bool = True,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """q [T, Hq, Dh], k and v [T, Hkv, Dh], on the CPU."""
        weights = (norm_weight, qkv_weight, q_norm_weight, k_norm_weight)
        tensors = [self.as_given(x, layout, self.dtype)]
        tensors += [self.as_given(weight, "contiguous", self.weight_dtype) for weight in weights]
        residual = torch.zeros_like(x) if residual is None else residual
        extra = self._extra(layout, residual=residual)
        extra |= self._extra("contiguous", bias=torch.zeros(len(qkv_weight)) if bias is None else bias)
        shapes = [[len(x), heads, len(q_norm_weight)] for heads in (num_q_heads, num_kv_heads, num_kv_heads)]
        return self._call([*tensors, eps, num_q_heads, num_kv_heads], extra, shapes, finite)

    def as_given(self, value: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
        """value as fn gets it. Raises Unasked for a layout that a file does not hold."""
        if self.way.files and layout != "contiguous":
            raise Unasked("a file holds numbers, not how they lie in memory")
        return laid_out(value.to(dtype, copy=True).contiguous().to(self.device), layout)

    def _extra(self, layout: str, **values: Tensor) -> dict[str, Tensor]:
        layout = ROOM if layout == X_ALONE else layout
        return {name: self.as_given(value, layout, self.dtype) for name, value in values.items() if self.takes(name)}

    def _call(
        self, arguments: list[Any], extra: dict[str, Any], shapes: list[list[int]], finite: bool
    ) -> tuple[Tensor, ...]:
        tensors = [value for value in (*arguments, *extra.values()) if isinstance(value, Tensor)]
        owners = [_bits(t if t._base is None else t._base) for t in tensors]  # what lies beside views too
        before = [owner.clone() for owner in owners]
        residual = extra.get("residual")
        scaled = residual is None or "alpha" in extra  # then its sum is another
        sums = None if scaled else arguments[0].float() + residual.float()
        try:
            with torch.no_grad():
                result = self.fn(*arguments, **extra)
        except (Exception, SystemExit) as error:  # whatever the callable raises is its verdict
            if isinstance(error, Fault):  # of a program, or of a form: it says all
                raise
            raise self._verdict(error, arguments, extra) from error
        states = zip(tensors, before, owners, strict=True)
        written = [tensor for tensor, old, new in states if not torch.equal(old, new)]
        outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
        if self.kind not in CHAINS:
            outputs = self._of_norm(outputs, arguments[0], residual, written, sums)
        else:
            outputs = self._of_chain(outputs, residual, written, sums, shapes)
        self._check_beside(written, before, owners, tensors)
        if self.sums.done:
            self.manners["x + residual"] = str(self.sums)
        self._check(outputs[: len(shapes)], shapes, finite)
        return tuple(output.detach().cpu().clone() for output in outputs)  # it may use the same buffer again

    def _of_norm(
        self, outputs: tuple[Any, ...], x: Tensor, residual: Tensor | None, written: list[Tensor], sums: Tensor | None
    ) -> tuple[Any, ...]:
        """(y,), or y in 8 bits and its scales, of what a norm returned, or wrote into x."""
        if outputs[0] is None and any(tensor is x for tensor in written):
            outputs = (x,)
        in_place = isinstance(outputs[0], Tensor) and outputs[0].data_ptr() == x.data_ptr()
        for tensor in written:
            if tensor is x and in_place:
                self.manners["y"] = "is written into x"
            elif tensor is not residual or (sums is not None and not self.sums.note(INTO_RESIDUAL, tensor, sums)):
                raise Fault("the callable writes into its inputs, and returns another tensor: give it copies")
        y, rest = outputs[0], self.sums.taken(outputs[1:], sums)
        eight = isinstance(y, Tensor) and y.dtype in EIGHT_BITS and list(y.shape) == list(x.shape)
        return (y, spread(next(iter(rest), None), list(x.shape))) if eight else (y,)

    def _of_chain(
        self, outputs: tuple[Any, ...], residual: Tensor | None, written: list[Tensor], sums: Tensor | None,
        shapes: list[list[int]],
    ) -> tuple[Any, ...]:  # fmt: skip
        """q, k and v by head, of what a chain returned."""
        for tensor in written:
            if tensor is not residual or sums is None or not self.sums.note(INTO_RESIDUAL, tensor, sums):
                raise Fault("the callable writes into its inputs: give it copies")
        if len(outputs) < len(shapes):
            return outputs
        self.sums.taken(outputs[len(shapes) :], sums)
        return tuple(_by_head(output, shape) for output, shape in zip(outputs, shapes, strict=False))

    def _check_beside(
        self, written: list[Tensor], before: list[Tensor], owners: list[Tensor], tensors: list[Tensor]
    ) -> None:
        """Raises Fault where a callable that works in place wrote beside the view that it was given."""
        for tensor, old, new in zip(tensors, before, owners, strict=True):
            if any(tensor is each for each in written):
                inside = torch.zeros_like(new, dtype=torch.bool)
                inside.as_strided(tensor.size(), tensor.stride(), tensor.storage_offset()).fill_(True)
                if not torch.equal(old[~inside], new[~inside]):
                    raise Fault("the callable writes beside the view that it is given")

    def _verdict(self, error: BaseException, arguments: list[Any], extra: dict[str, Any]) -> Fault:
        """What to say of an exception of fn called with these."""
        text = " ".join(str(error).split())[:300]
        if isinstance(error, TypeError) and (parameters := _misfit(self.fn, arguments, extra)):
            named = f", {' and '.join(extra)} by name" if extra else ""
            return Fault(f"the callable takes ({parameters}), it must take {KINDS[self.kind]}{named}: wrap it in one")
        if _raised_by_the_machine(error) and not isinstance(error, IndexError):  # that is an access out of bounds
            return Refused(f"its Triton kernel cannot be run on a CPU: {text}")
        kind = Fault if _raised_by_the_machine(error) else Refused
        return kind(f"the callable raised {type(error).__name__}: {text}")

    def _check(self, outputs: tuple[Any, ...], shapes: list[list[int]], finite: bool) -> None:
        if len(outputs) != len(shapes) or not all(isinstance(output, Tensor) for output in outputs):
            kinds = ", ".join(type(output).__name__ for output in outputs)
            raise Fault(f"the callable returned ({kinds}), expected {KINDS[self.kind]}")
        for output, shape in zip(outputs, shapes, strict=True):
            if output.layout != torch.strided or output.is_meta:
                layout = "meta" if output.is_meta else "sparse"
                raise Fault(f"the callable returned a {layout} tensor, expected a dense one")
            if list(output.shape) != shape:
                raise Fault(f"the callable returned shape {list(output.shape)}, expected {shape}")
            eight = EIGHT_BITS if self.kind not in CHAINS else ()
            if output.dtype not in (self.weight_dtype, torch.float32, *eight) or output.dtype != outputs[0].dtype:
                expected = f"{self.weight_dtype} or torch.float32 throughout"
                raise Fault(f"the callable returned {output.dtype}, expected {expected}")
            wrong = 1 - output.float().isfinite().double().mean().item()
            if wrong and finite:
                raise Fault(f"the callable returned NaN or infinity for {wrong:.2%} of the elements of finite inputs")


def _bits(value: Tensor) -> Tensor:
    return value.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[value.itemsize])


def _by_head(output: Any, shape: list[int]) -> Any:
    """[T, heads * Dh] as [T, heads, Dh]; anything else as it is."""
    flat = isinstance(output, Tensor) and output.layout == torch.strided
    flat = flat and list(output.shape) == [shape[0], shape[1] * shape[2]]
    return output.reshape(shape) if flat else output


def _misfit(fn: Callable[..., Any], arguments: list[Any], extra: dict[str, Any]) -> str:
    """fn's parameters where it cannot take these arguments; empty if it can, or says nothing."""
    try:
        signature_of(fn).bind(*arguments, **extra)
    except TypeError:
        parameters = _parameters(fn)
        return ", ".join(parameters[:12]) + ", ..." * (len(parameters) > 12)
    return ""


def _raised_by_the_machine(error: BaseException) -> bool:
    """Whether it comes from castpoint.harness.ptx.machine or what it is made of: a Triton kernel's PTX run on a CPU."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("castpoint.harness.ptx.") for name in frames)
