"""Are two kernels one function? If not, the first boundary at which they part, and a smallest input on which they
do."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import capture, captured, probes
from castpoint.harness.fingerprint.answer import Answer, agree
from castpoint.harness.fingerprint.arguments import parameters_of
from castpoint.harness.fingerprint.blackbox import BlackBox, Refused
from castpoint.harness.fingerprint.calls import NormCalls
from castpoint.harness.fingerprint.chain_questions import drawn_weights
from castpoint.harness.fingerprint.evidence import UNEXPLAINED
from castpoint.harness.fingerprint.forms import as_kind
from castpoint.harness.fingerprint.heads import Geometry
from castpoint.harness.fingerprint.kinds import CHAINS
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.questions import WIDTHS
from castpoint.harness.fingerprint.rules import Rows
from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.runs.errors import UserError
from castpoint.kernels.plan import BOUNDARIES, KEEP

Stored = Callable[[Tensor], Tensor]  # all that is stored of x [T, D], [T, C] fp32; NaN and infinity as numbers


@dataclass(frozen=True)
class Comparison:
    """first, second: the answers of identify. same: whether one plan says both, None where neither is known.

    parts: the first boundary at which they part, and both words. bits: how many elements differ of how many that both
    were asked, on inputs of one kind and size. smallest: an input on which they differ, in words.
    """

    same: bool | None
    parts: str
    bits: str
    smallest: str
    first: Answer
    second: Answer

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def line(self) -> str:
        """The verdict in one line."""
        if self.same is None:
            return f"not known whether it is one function: {self.bits}"
        if self.same:
            return f"one plan: {self.bits}"
        return f"two functions{f', which part at {self.parts}' if self.parts else ''}: {self.bits}"

    def told(self, names: tuple[str, str]) -> str:
        """The comparison in lines for a reader."""
        lines = [self.line]
        for name, answer in zip(names, (self.first, self.second), strict=True):
            plans = f", {', '.join(answer.plans)}" if answer.plans else ""
            lines.append(f"{name}: {answer.status}{plans}{': ' if answer.reason else ''}{answer.reason}")
        return "\n".join([*lines, *([f"a smallest input: {self.smallest}"] if self.smallest else [])])


def compare(
    first: Callable[..., Any], second: Callable[..., Any], kind: str, device: str, sizes: Sizes,
    calls: tuple[str, str] = ("", ""),
) -> Comparison:  # fmt: skip
    """Of two callables of one kind. calls: how each is called, where that is a norm. Raises Fault where one of them
    cannot be called."""
    if beyond := sizes.beyond(kind):
        raise Fault(beyond)
    both = list(zip((first, second), calls, strict=True))
    answers = [identify(fn, kind, device, sizes, call) for fn, call in both]
    given, asked = [_with_gate(as_kind(fn, kind, call)) for fn, call in both], []
    make = functools.partial(_of_chain if kind in CHAINS else _of_norm, sizes=sizes)
    boxes = [BlackBox(fn, kind, device, dtype=sizes.dtype) for fn in given]
    for box, answer in zip(boxes, answers, strict=True):
        box.a_weight_a_head = answer.facts.get("weight", "").startswith("[H, Dh]")
    x, said, asked = make(boxes)
    stored = [ask(x) for ask in asked]
    differ = stored[0] != stored[1]
    bits = f"{int(differ.sum())} of {differ.numel()} elements differ" if differ.any() else "the same bits"
    parts, same = parted(*answers, share=differ.double().mean().item())
    smallest = said(*smallest_row(x, asked), asked) if differ.any() else ""
    return Comparison(same, parts, f"{bits} ({len(x)} rows of {x.shape[1]})", smallest, *answers)


def _with_gate(fn: Callable[..., Any]) -> Callable[..., Any]:
    """fn with a Gaussian gate, where it takes one."""
    parameters = parameters_of(fn)
    if "gate" not in parameters:
        return fn

    def function(x: Tensor, *rest: Any, **named: Any) -> Any:
        gate = probes.gaussian(x.shape, torch.Generator().manual_seed(9)).to(x)
        return fn(x, *rest, gate=gate, **named)

    others = [parameter for name, parameter in parameters.items() if name != "gate"]
    function.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
    return function


def compare_captures(first: Path, second: Path, sizes: Sizes) -> Comparison:
    """Of two recorded calls with equal inputs. Raises UserError for others."""
    captures = [capture.read(path, sizes) for path in (first, second)]
    given = [_inputs(each) for each in captures]
    other = [name for name in given[0].keys() | given[1].keys() if not _equal(*(g.get(name) for g in given))]
    if other:
        raise UserError(f"{second} has another {sorted(other)[0]} than {first}: captures are compared on equal inputs")
    answers = [captured.explain(each) for each in captures]
    said, wrong, number = [], 0, 0
    for name in (name for name in captures[0].outputs if name in captures[1].outputs):
        a, b = (each.outputs[name].float().flatten(1) for each in captures)
        places = (a != b).nonzero().tolist()
        wrong, number = wrong + len(places), number + a.numel()
        if places:
            row, column = places[0]
            said.append(f"token {row}, {name} element {column} is {a[row, column]:.9g} against {b[row, column]:.9g}")
    bits = f"{wrong} of {number} elements differ" if wrong else f"the same bits in {number} elements"
    parts, same = parted(*answers, share=wrong / number)
    return Comparison(same, parts, bits, said[0] if said else "", *(Answer(**_as_answer(a)) for a in answers))


def _inputs(recorded: capture.Capture) -> dict[str, Any]:
    if isinstance(recorded, capture.Norm):
        return {"x": recorded.x, "weight": recorded.weight, "residual": recorded.residual, "eps": recorded.eps}
    return recorded.problem.inputs()


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and (a is None or bool(a == b))


def _as_answer(answer: Answer) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(Answer)]
    return {name: value for name, value in answer.as_dict().items() if name in names}


def parted(first: Answer, second: Answer, share: float) -> tuple[str, bool | None]:
    """The first boundary at which two answers part, or what else differs, and whether one plan says both. share: of
    elements that differ, of which one plan explains twice UNEXPLAINED."""
    if not first.candidates or not second.candidates:
        known = {answer.status for answer in (first, second)} == {"none"}
        return "", None if not share or known else False
    a, b = first.candidates[0], second.candidates[0]
    if any(agree(a, b) for a in first.candidates for b in second.candidates):
        sums = [_sum_of(answer) for answer in (first, second)]
        if sums[0] != sums[1]:
            return f"x + residual, {sums[0]} against {sums[1]}", False
        return "", share <= 2 * UNEXPLAINED or a.get("out", a.get("hidden")) == KEEP
    names = [*(name for name in BOUNDARIES if name in a), *(name for name in a if name not in BOUNDARIES)]
    name = next(name for name in names if name in b and not agree({name: a[name]}, {name: b[name]}))
    return f"{name}, {a[name]} against {b[name]}", False


def _sum_of(answer: Answer) -> str:
    """How x + residual is given back, in words; wherever."""
    if "x" not in answer.candidates[0]:
        return "no residual"
    said = answer.facts.get("x + residual", "")
    return f"given back{''.join(said.partition(' as ')[1:])}" if said else "not given back"


def smallest_row(x: Tensor, asked: list[Stored]) -> tuple[Tensor, int]:
    """A row alone [1, D] on which two functions store other bits, with as few channels that are not zero as were found
    by leaving out half of them, a quarter and so on; and the place in what is stored. Of rows that differ in company
    alone all of them, [T, D]."""

    def place(row: Tensor) -> int | None:
        differ = (asked[0](row) != asked[1](row)).flatten().nonzero()
        return int(differ[0]) if len(differ) else None

    rows = (asked[0](x) != asked[1](x)).any(1).nonzero()[:, 0]
    row = next((x[i : i + 1] for i in rows.tolist() if place(x[i : i + 1]) is not None), None)
    if row is None:
        return x, int(place(x) or 0)
    size = row.shape[1]
    while size >= 1:
        for left in row[0].nonzero()[:, 0].split(size):
            tried = row.clone()
            tried[0, left] = 0
            if place(tried) is not None:
                row = tried
        size //= 2
    return row, int(place(row) or 0)


Said = Callable[[Tensor, int, list[Stored]], str]


def _of_norm(boxes: list[BlackBox], sizes: Sizes) -> tuple[Tensor, Said, list[Stored]]:
    """Rows for two norms, at the first width that both take; how a row is told; and both, asked."""
    heads = (sizes.heads or (4,))[0] if boxes[0].kind == "head_norm" else None
    own = sizes.head_dim if heads else sizes.width
    rows, width = None, 0
    for width in [own] if own else [probes.HEAD_DIM] if heads else [probes.WIDTH, *WIDTHS]:
        calls = [NormCalls(box, width, heads, sizes.tokens) for box in boxes]
        rows, _ = probes.first_rows(width, residual=False)
        try:
            for each in calls:
                each.call(rows)
            break
        except Refused as refused:
            error = refused
    else:
        raise error
    gaussian = probes.gaussian([len(rows.x), width], torch.Generator().manual_seed(0))
    x = torch.cat([pad(rows.x, (0, width - rows.x.shape[1])), gaussian])
    weights = probes.weight_of_width(rows.weight, width)

    def stored(calls: NormCalls, x: Tensor) -> Tensor:
        """Of 8 bits what they stand for."""
        call = calls.call(Rows(x, weights, rows.eps, width))
        scales = 1 if call.rows.scales is None else call.rows.scales
        return (call.stored * scales).nan_to_num(nan=7e37)

    asked = [functools.partial(stored, each) for each in calls]

    def said(x: Tensor, place: int, asked: list[Stored]) -> str:
        row, column = divmod(place, x.shape[1])
        weight = f"weight {weights[column]:.9g}, eps={rows.eps:g}"
        return f"{_input(x, width)}, {weight}: channel {column} is {_both(x, place, asked)}"

    return x, said, asked


def _of_chain(boxes: list[BlackBox], sizes: Sizes) -> tuple[Tensor, Said, list[Stored]]:
    """The same for two chains, with Gaussian weights of one geometry."""
    heads = (sizes.heads or Geometry().heads) * (1 if sizes.heads is None or len(sizes.heads) == 2 else 2)
    geometry = Geometry(sizes.width or 256, heads[0], heads[1], sizes.head_dim or 128)
    weights = [weight.float() for weight in drawn_weights(geometry)]
    x = probes.gaussian([sizes.tokens or probes.ROWS, geometry.width], torch.Generator().manual_seed(0))

    def stored(box: BlackBox, x: Tensor) -> Tensor:
        outputs = box.qkv(x, *weights, probes.EPS_SMALL, *geometry.heads)
        return torch.cat([output.float().flatten(1) for output in outputs], dim=1).nan_to_num(nan=7e37)

    asked = [functools.partial(stored, box) for box in boxes]

    def said(x: Tensor, place: int, asked: list[Stored]) -> str:
        head, channel = divmod(place % geometry.columns, geometry.head_dim)
        names = [*(f"q{i}" for i in range(heads[0])), *(f"{n}{i}" for n in "kv" for i in range(heads[1]))]
        where = f"{names[head]}, channel {channel}"
        return f"{_input(x, geometry.width)}, weights drawn for {geometry}: {where} is {_both(x, place, asked)}"

    return x, said, asked


def _input(x: Tensor, width: int) -> str:
    shown = [f"x[{i}] = {x[0, i]:.9g}" for i in x[0].nonzero()[:, 0].tolist()]
    if len(x) > 1:
        return f"x [{len(x)}, {width}], Gaussian and exact rows: alone none of them differs"
    more = f" and {len(shown) - 4} more" if len(shown) > 4 else ""
    return f"x [1, {width}], zero but {', '.join(shown[:4])}{more}"


def _both(x: Tensor, place: int, asked: list[Stored]) -> str:
    a, b = (ask(x).flatten()[place].item() for ask in asked)
    return f"{a:.9g} against {b:.9g}"
