"""How a kernel takes q and k, the weights of their norms, and what it rotates them by: the forms that engines have.

q and k apart or packed in qkv, in place or returned; cos and sin of each token, a table of them with positions, or a
base with positions; mRoPE's sections; number and size of heads, in arguments or as constants of the user's call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import arguments, forms
from castpoint.harness.fingerprint.blackbox import Refused, Unasked
from castpoint.harness.fingerprint.forms import Form, Name
from castpoint.harness.fingerprint.layouts import CONTIGUOUS, GAPS, HEADS_FIRST, ODD, OFFSET, ROWS, inside, laid_out
from castpoint.harness.fingerprint.stores import same
from castpoint.harness.fingerprint.turns import Turn

ALIASES = {
    "q": ("q", "query", "query_states", "queries", "xq"),
    "k": ("k", "key", "key_states", "keys", "xk"),
    "qkv": ("qkv", "mixed_qkv", "packed_qkv", "qkv_states"),
    "q_weight": ("q_weight", "q_norm_weight", "q_norm", "q_gamma", "q_w", "w_q", "weight_q", "norm_weight_q"),
    "k_weight": ("k_weight", "k_norm_weight", "k_norm", "k_gamma", "k_w", "w_k", "weight_k", "norm_weight_k"),
    "eps": arguments.ALIASES["eps"],
    "cos": ("cos", "freqs_cos", "rope_cos", "cos_cache"),
    "sin": ("sin", "freqs_sin", "rope_sin", "sin_cache"),
    "cos_sin_cache": ("cos_sin_cache", "cos_sin", "rope_cache", "rotary_cache"),
    "base": ("base", "theta", "rope_theta", "rotary_base", "rope_base"),
    "positions": ("positions", "position_ids", "pos_ids", "position", "pos"),
    "num_heads_q": ("num_heads_q", "num_q_heads", "num_attention_heads", "num_heads", "num_qo_heads", "q_heads", "hq"),
    "num_heads_k": ("num_heads_k", "num_k_heads", "num_kv_heads", "num_heads_kv", "num_key_value_heads", "kv_heads",
                    "k_heads", "hkv"),
    "num_heads_v": ("num_heads_v", "num_v_heads", "v_heads"),
    "head_dim": ("head_dim", "head_size", "dim_head", "dh"),
    "rotary_dim": ("rotary_dim", "rot_dim", "rope_dim"),
    "is_neox": ("is_neox", "is_neox_style", "neox", "neox_style"),
    "interleaved": ("interleaved", "rotary_interleaved", "interleave"),
    "mrope_section": ("mrope_section", "mrope_sections"),
    "mrope_interleaved": ("mrope_interleaved",),
    "q_out": ("q_out", "out_q", "q_output", "q_embed"),
    "k_out": ("k_out", "out_k", "k_output", "k_embed"),
}  # fmt: skip
MEANING = {alias: name for name, aliases in ALIASES.items() for alias in aliases}
EXAMPLE = (
    "give --call 'fn(q, k, q_weight, k_weight, cos, sin, eps)' as it is called, with qkv, cos_sin_cache, positions, "
    "base, num_heads_q, num_heads_k, num_heads_v, head_dim, rotary_dim, is_neox, mrope_section and constants"
)
TABLES = ("cos", "cos_sin_cache")
VIEWS = "views of a packed qkv"
ANGLES = "cos and sin, or three rows of positions, as views of a wider buffer"
TABLE_OFFSET = "cos and sin as views at an offset of one element"
APART = "positions apart, and rows of a wider table"
LAYOUTS = (VIEWS, ODD, OFFSET, HEADS_FIRST)
PACKED_LAYOUTS = (ROWS, ODD, OFFSET)


def is_pair(fn: Callable[..., Any], call: str = "") -> bool:
    """Whether what fn takes, by its names or as it is called, is q, k and the weights of their norms."""
    try:
        form = _form(fn, call)
    except Fault:
        return False
    return _lacks(form) == ""


def _lacks(form: Form) -> str:
    there = set(form.names)
    inputs = "qkv" in there or {"q", "k"} <= there
    lacks = [] if inputs else ["q and k or qkv"]
    return " and ".join([*lacks, *(name for name in ("q_weight", "k_weight", "eps") if name not in there)])


def _form(fn: Callable[..., Any], call: str) -> Form:
    if call:
        return forms.form_of(call, MEANING, EXAMPLE)
    parts = forms.arguments(fn)
    unknown = [name for name, default, _ in parts if name not in MEANING and not default]
    if unknown or not parts:
        raise Fault(f"its argument {' and '.join(unknown) or '*args'} is not known: {EXAMPLE}")
    return Form((), {name: Name(MEANING[name]) for name, _, _ in parts if name in MEANING})


@dataclass(frozen=True)
class Pair:
    """A kernel of q and k in its form. fixed: numbers of the user's call whose meaning fn's own names tell; manners:
    what it does with its inputs, in words, filled as it is called."""

    fn: Callable[..., Any]
    form: Form
    fixed: dict[str, Any]
    device: str = "cpu"
    flat: bool = False  # it takes q [T, Hq * Dh] and k [T, Hkv * Dh]
    manners: dict[str, str] = field(default_factory=dict)

    def takes(self, *names: str) -> bool:
        """Whether it has one of these arguments."""
        return any(name in self.form.names for name in names)

    @property
    def packed(self) -> bool:
        return self.takes("qkv")

    @property
    def rotates(self) -> bool:
        """Whether it is given angles."""
        return self.takes(*TABLES, "base", "positions") or "base" in self.fixed

    @property
    def makes_angles(self) -> bool:
        return self.rotates and not self.takes(*TABLES)

    def __call__(
        self, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, turn: Turn | None = None,
        layout: str = "contiguous", neox: bool = True,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """q [T, Hq, Dh] and k [T, Hkv, Dh] as it stores them; they may be q and k, written in place. Raises Fault where
        it changes v or writes anywhere else, Refused for heads that are not those of the user's call."""
        values: dict[str, Any] = {"q_weight": q_weight, "k_weight": k_weight, "eps": eps}
        values |= self._sizes(q, k) | {"is_neox": neox, "interleaved": not neox}
        values |= {} if turn is None else turn.arguments(self.takes("positions"), self.device, layout == ANGLES)
        if layout == APART:
            given = [name for name in ("positions", *TABLES, "sin") if name in values]
            values |= {name: laid_out(values[name], GAPS if name == "positions" else ROWS) for name in given}
        if layout == TABLE_OFFSET:
            values |= {name: laid_out(values[name], OFFSET) for name in (*TABLES, "sin") if name in values}
        layout = CONTIGUOUS if layout in (ANGLES, APART, TABLE_OFFSET) else layout
        v = torch.empty(0)
        if self.packed:
            v = (k * 3).roll(1, 0).contiguous()
            packed = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
            values["qkv"] = packed = laid_out(packed, layout)
            q, k, here = (part.unflatten(1, (-1, q.shape[2])) for part in packed.split(_widths(q, k, v), dim=1))
        else:
            values["q"], values["k"] = q, k = _views(q, k, layout)
            if self.flat:
                values["q"], values["k"] = (_flat(part) for part in (q, k))
        values |= {f"{name}_out": torch.full_like(given, torch.nan) for name, given in (("q", q), ("k", k))}
        used = [values[name] for name in dict.fromkeys(self.form.names) if isinstance(values.get(name), Tensor)]
        owners = [tensor if tensor._base is None else tensor._base for tensor in used]
        before = [owner.clone() for owner in owners]
        result = self.form.call(self.fn, values)
        outputs = self._outputs(result, values, q, k, v)
        pairs = list(zip(owners, before, strict=True))
        if self.packed and not same(here, v):
            raise Fault("the callable changes v in qkv, which passes through")
        if any(_beside(owner, old, [*outputs, q, k]) for owner, old in pairs):
            raise Fault("the callable writes beside q and k, into what it is given: give it copies")
        if any(_beside(owner, old, outputs) for owner, old in pairs):
            raise Fault("the callable writes into q and k, and returns other tensors: give it copies")
        return outputs

    def _sizes(self, q: Tensor, k: Tensor) -> dict[str, Any]:
        sizes = {
            "num_heads_q": q.shape[1],
            "num_heads_k": k.shape[1],
            "num_heads_v": k.shape[1],
            "head_dim": q.shape[2],
        }
        if any(self.fixed.get(name, size) != size for name, size in sizes.items()):
            raise Refused("the call says other numbers of heads, or another head_dim")
        return sizes

    def _outputs(self, result: Any, values: dict[str, Any], q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.takes("q_out"):
            return values["q_out"], values["k_out"]
        if isinstance(result, Tensor) and self.packed and list(result.shape) == [len(q), sum(_widths(q, k, v))]:
            result = result.split(_widths(q, k, v), dim=1)
        if result is None:
            self.manners["q and k"] = "are written in place"
            return q, k
        if not (
            isinstance(result, tuple | list) and len(result) in (2, 3) and all(isinstance(r, Tensor) for r in result)
        ):
            raise Fault(
                f"the callable returned {type(result).__name__}, expected (q, k), or None where it works in place"
            )
        if len(result) == 3 and v.numel():
            _check_v(result[2], v)
        self.manners["q and k"] = "are returned"
        for given, output, name in ((q, result[0], "q"), (k, result[1], "k")):
            if output.shape not in (given.shape, given.flatten(1).shape):
                raise Fault(f"the callable returned {name} of shape {list(output.shape)}, expected {list(given.shape)}")
        return result[0].reshape(q.shape), result[1].reshape(k.shape)


def pair_of(fn: Callable[..., Any], call: str, device: str) -> Pair:
    """fn in its form. Raises Fault where its names, or its call, do not tell it."""
    form = _form(fn, call)
    if lacks := _lacks(form):
        raise Fault(f"{call or 'its call'} lacks {lacks}: {EXAMPLE}")
    pair = Pair(fn, form, _fixed(fn, form), device)
    if pair.takes("cos") != pair.takes("sin") or (pair.takes("cos_sin_cache") and not pair.takes("positions")):
        raise Fault(
            f"it takes angles without {'positions' if pair.takes('cos_sin_cache') else 'cos or sin'}: {EXAMPLE}"
        )
    return pair


def _fixed(fn: Callable[..., Any], form: Form) -> dict[str, Any]:
    names = [name for name, _, _ in forms.arguments(fn)]
    told = {**dict(zip(names, form.places, strict=False)), **form.named}
    return {MEANING[name]: part for name, part in told.items() if name in MEANING and not isinstance(part, Name)}


def _widths(*parts: Tensor) -> list[int]:
    return [part.shape[1] * part.shape[2] for part in parts]


def _flat(part: Tensor) -> Tensor:
    """[T, H, Dh] as [T, H * Dh]. Raises Unasked where that is no view."""
    flat = part.flatten(1)
    if flat.data_ptr() != part.data_ptr():
        raise Unasked("heads that do not lie beside each other are not flat")
    return flat


def _views(q: Tensor, k: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    if layout != VIEWS:
        return laid_out(q, layout), laid_out(k, layout)
    packed = torch.cat([q, k, k.roll(1, 0)], dim=1)
    return packed[:, : q.shape[1]], packed[:, q.shape[1] : q.shape[1] + k.shape[1]]


def _check_v(output: Tensor, v: Tensor) -> None:
    """Raises Fault unless output is v, by head or flat."""
    if output.dtype != v.dtype or output.shape not in (v.shape, v.flatten(1).shape):
        said, expected = (f"{list(value.shape)} of {value.dtype}" for value in (output, v))
        raise Fault(f"the callable returned v as {said}, expected {expected}")
    if not same(output.reshape(v.shape), v):
        raise Fault("the callable changes v, which passes through")


def _beside(owner: Tensor, old: Tensor, views: Iterable[Tensor]) -> bool:
    """Whether owner was written to outside of those of its views."""
    if same(owner, old):
        return False
    beside = ~inside(owner, views)
    return not same(old[beside], owner[beside])
