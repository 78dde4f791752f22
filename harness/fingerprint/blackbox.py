"""A callable under test: called with copies, watched, and held to its contract."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.arguments import signature_of
from castpoint.harness.fingerprint.kinds import CHAINS, KINDS, parameters_told, paths, weightless
from castpoint.harness.fingerprint.layouts import CONTIGUOUS, UPDATED, inside, laid_out, of_each, of_projection
from castpoint.harness.fingerprint.stores import EIGHT_BITS, same, spread
from castpoint.harness.fingerprint.sums import Sums, Totals, totals
from castpoint.harness.ptx import driver
from castpoint.kernels.plan import KEEP


class Refused(Fault):
    """The callable raised an exception instead of an answer."""


class Stale(Fault):
    """What a callable stores is of weights that are no more."""


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
    may write y into x or residual, and both may write x + residual into one of them, or return it. Of kind qkv q, k and
    v may be flat, [T, heads * Dh]. A norm_linear is called as a chain, by forms.linear.
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
        self.divided = self.gain = 1.0  # inside, x is so many times what it is given, and the result what it stores
        self.group = 0  # channels that have one scale, of its first call
        self.manners: dict[str, str] = {}  # what it does with its inputs, in words
        self.residual_dtype = self.dtype
        self.gradients = False  # whether it is called as in training
        self.cut_off = False  # whether it was, and what it stored has no gradient
        self._last: list[Tensor] = []  # what the last call stored, kept so that its memory is not free
        self.sums = self.new_sums()

    def new_sums(self) -> Sums:
        """What is known of x + residual before a call."""
        usual = KEEP if self.residual_dtype == torch.float32 else f"{self.narrow}-rne"
        return Sums(self.narrow, usual, getattr(self.fn, "sum_is", "is returned"))

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
        weight a head [H, D]. layout: how all lie in memory, of layouts. finite: y must be. more: what
        fn is given by name besides."""
        residual = torch.zeros_like(x) if residual is None else residual
        weights = []
        if not self.weightless:
            weight = weight.expand(x.shape[-2], -1) if self.a_weight_a_head else weight
            weights = [self.as_given(weight, of_each(layout)[1], weight_dtype or self.weight_dtype)]

        def ask() -> tuple[Tensor, ...]:
            extra = self._extra(layout, residual=residual)
            arguments = [self.as_given(x, of_each(layout)[0], self.dtype), *weights, eps]
            return self._call(arguments, extra | more, [list(x.shape)], finite)

        return Stored(*self._asked(layout, weights, ask))

    def qkv(
        self, x: Tensor, norm_weight: Tensor, qkv_weight: Tensor, q_norm_weight: Tensor, k_norm_weight: Tensor,
        eps: float, num_q_heads: int, num_kv_heads: int, residual: Tensor | None = None, bias: Tensor | None = None,
        layout: str = "contiguous", finite: bool = True,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """q [T, Hq, Dh], k and v [T, Hkv, Dh], on the CPU."""
        given = (norm_weight, qkv_weight, q_norm_weight, k_norm_weight)
        its_own = [of_each(layout)[1]] * 4
        its_own[1] = of_projection(layout)
        weights = [self.as_given(w, its, self.weight_dtype) for w, its in zip(given, its_own, strict=True)]
        residual = torch.zeros_like(x) if residual is None else residual
        bias = torch.zeros(len(qkv_weight)) if bias is None else bias
        shapes = [[len(x), heads, len(q_norm_weight)] for heads in (num_q_heads, num_kv_heads, num_kv_heads)]

        def ask() -> tuple[Tensor, ...]:
            extra = self._extra(layout, residual=residual) | self._extra(CONTIGUOUS, bias=bias)
            x_given = self.as_given(x, of_each(layout)[0], self.dtype)
            return self._call([x_given, *weights, eps, num_q_heads, num_kv_heads], extra, shapes, finite)

        return self._asked(layout, weights, ask)

    def _asked(self, layout: str, weights: list[Tensor], ask: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What ask returns; of UPDATED once there was another call with other numbers in the same weights."""
        if layout == UPDATED and weights:
            kept = [weight.clone() for weight in weights]
            for weight in weights:
                weight.copy_(weight.flip(-1))
            before = ask()
            for weight, own in zip(weights, kept, strict=True):
                weight.copy_(own)
            after = ask()
            if all(map(torch.equal, before, after)):
                raise Stale("the callable stores what it stored with other numbers in it")
            return after
        return ask()

    def as_given(self, value: Tensor, layout: str, dtype: torch.dtype) -> Tensor:
        """value as fn gets it. Raises Unasked for a layout that a file does not hold."""
        if self.way.files and layout != CONTIGUOUS:
            raise Unasked("a file holds numbers, not how they lie in memory")
        return laid_out(value.to(dtype, copy=True).contiguous().to(self.device), layout)

    def _extra(self, layout: str, **values: Tensor) -> dict[str, Tensor]:
        return {
            name: self.as_given(value, of_each(layout)[2], self.residual_dtype if name == "residual" else self.dtype)
            for name, value in values.items()
            if self.takes(name)
        }

    def _call(
        self, arguments: list[Any], extra: dict[str, Any], shapes: list[list[int]], finite: bool
    ) -> tuple[Tensor, ...]:
        tensors = [value for value in (*arguments, *extra.values()) if isinstance(value, Tensor)]
        owners = [_bits(t if t._base is None else t._base) for t in tensors]  # what lies beside views too
        before = [owner.clone() for owner in owners]
        residual = extra.get("residual")
        sums = None if residual is None else totals(arguments[0], residual, extra.get("alpha"), self.narrow)
        if self.gradients:
            _require_gradients(arguments, extra)
        try:
            with torch.set_grad_enabled(self.gradients):
                result = self.fn(*arguments, **extra)
        except (Exception, SystemExit) as error:  # whatever the callable raises is its verdict
            if isinstance(error, Fault):  # of a program, or of a form: it says all
                raise
            raise self._verdict(error, arguments, extra) from error
        states = zip(tensors, before, owners, strict=True)
        written = [tensor for tensor, old, new in states if not torch.equal(old, new)]
        outputs = tuple(result) if isinstance(result, tuple | list) else (result,)
        self.cut_off = self.gradients and isinstance(outputs[0], Tensor) and not outputs[0].requires_grad
        outputs = tuple(value.detach() if isinstance(value, Tensor) else value for value in outputs)
        if self.kind not in CHAINS:
            outputs = self._of_norm(outputs, arguments[0], residual, written, sums)
        else:
            outputs = self._of_chain(outputs, arguments[0], residual, written, sums, shapes)
        self._check_beside(written, before, owners, tensors)
        if residual is not None and sums is not None:
            self.sums.hold(arguments[0], residual, sums)
        if self.sums.done:
            self.manners["x + residual"] = str(self.sums)
        self._check(outputs[: len(shapes)], shapes, finite)
        self._note_memory([outputs[i] for i in range(len(shapes))])
        return tuple(output.detach().cpu().clone() for output in outputs)  # it may use the same buffer again

    def _of_norm(
        self, outputs: tuple[Any, ...], x: Tensor, residual: Tensor | None, written: list[Tensor], sums: Totals | None
    ) -> tuple[Any, ...]:
        """(y,), or y in 8 bits and its scales, of what a norm returned, or wrote into x or residual."""
        if outputs[0] is None:
            both = [tensor for tensor in (x, residual) if any(tensor is each for each in written)]
            results = [tensor for tensor in both if sums is None or not self.sums.is_one(tensor, sums)]
            outputs = (*results, *both, None)[:1]
        if (
            len(outputs) == 2
            and sums is not None
            and [self.sums.is_one(each, sums) for each in outputs] == [True, False]
        ):
            outputs = outputs[::-1]
        place = outputs[0].data_ptr() if isinstance(outputs[0], Tensor) else None
        for tensor in written:
            into = "x" if tensor is x else "residual" if tensor is residual else ""
            if into and tensor.data_ptr() == place:
                self.manners["y"] = f"is written into {into}"
            elif into and isinstance(outputs[0], Tensor) and same(tensor, outputs[0].to(tensor.dtype)):
                self.manners["y"] = f"is returned, and written into {into}"
            elif not into or (into == "x" and sums is None):
                raise Fault("the callable writes into its inputs, and returns another tensor: give it copies")
            elif sums is not None and not self.sums.note(f"is written into {into}", tensor, sums):
                raise Fault(
                    f"the callable writes into {into} what is not x + residual, beside its result: give it a copy"
                )
        y, rest = outputs[0], self.sums.taken(outputs[1:], sums)
        eight = isinstance(y, Tensor) and y.dtype in EIGHT_BITS and list(y.shape) == list(x.shape)
        given = next(iter(rest), None)
        scales = [spread(given, list(x.shape), self.group)] if eight else []
        if eight and not self.group and given is not None:
            self.group = x.shape[-1] // parts if (parts := given.numel() // math.prod(x.shape[:-1])) > 1 else 0
        if beside := [f"{o.dtype} of {o.ndim} dimensions" for o in rest[len(scales) :] if isinstance(o, Tensor)]:
            are = "is" if len(beside) == 1 else "are"
            self.manners["beside y"] = f"{' and '.join(beside)}, which {are} not looked at"
        return (y, *scales)

    def _of_chain(
        self, outputs: tuple[Any, ...], x: Tensor, residual: Tensor | None, written: list[Tensor],
        sums: Totals | None, shapes: list[list[int]],
    ) -> tuple[Any, ...]:  # fmt: skip
        """q, k and v by head, of what a chain returned."""
        for tensor in written:
            into = "x" if tensor is x else "residual" if tensor is residual else ""
            if not into or sums is None or not self.sums.note(f"is written into {into}", tensor, sums):
                raise Fault("the callable writes into its inputs: give it copies")
        if sums is not None and len(outputs) > len(shapes) and self.sums.is_one(outputs[0], sums):
            outputs = (*outputs[1:], outputs[0])
        if len(outputs) < len(shapes):
            return outputs
        self.sums.taken(outputs[len(shapes) :], sums)
        return tuple(_by_head(output, shape) for output, shape in zip(outputs, shapes, strict=False))

    def _note_memory(self, outputs: list[Tensor]) -> None:
        """Notes whether they lie where those of the last call lie, which are still in use; of files all lie in one."""
        old, new = ({t.untyped_storage().data_ptr() for t in made if t.numel()} for made in (self._last, outputs))
        if old & new and not self.way.files:
            self.manners["result"] = "lies where the last call's lay, which is written over"
        self._last = outputs

    def _check_beside(
        self, written: list[Tensor], before: list[Tensor], owners: list[Tensor], tensors: list[Tensor]
    ) -> None:
        """Raises Fault where a callable that works in place wrote beside the view that it was given."""
        for tensor, old, new in zip(tensors, before, owners, strict=True):
            beside = ~inside(new, [tensor])
            if any(tensor is each for each in written) and not torch.equal(old[beside], new[beside]):
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
            if wrong and finite and not driver.compiles_only:
                raise Fault(f"the callable returned NaN or infinity for {wrong:.2%} of the elements of finite inputs")


def _require_gradients(arguments: list[Any], extra: dict[str, Any]) -> None:
    """As in training: x and what else is no weight are results of something, which may be written in place."""
    first, *weights = (value for value in arguments if isinstance(value, Tensor))
    for weight in weights:
        weight.requires_grad_()
    with torch.enable_grad():
        for value in (first, *(value for value in extra.values() if isinstance(value, Tensor))):
            value.copy_(value.clone().requires_grad_())


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
        parameters = parameters_told(fn)
        return ", ".join(parameters[:12]) + ", ..." * (len(parameters) > 12)
    return ""


def _raised_by_the_machine(error: BaseException) -> bool:
    """Whether it comes from castpoint.harness.ptx.machine or what it is made of: a Triton kernel's PTX run on a CPU."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(name.startswith("castpoint.harness.ptx.") for name in frames)
