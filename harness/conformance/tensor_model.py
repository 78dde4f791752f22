"""How a tensor core is said to add: a model in exact integers, which runs where its operands are.

Per step of k (16 on Hopper) the products and the accumulator are aligned to the largest exponent among them, each is
cut toward zero to a number of fraction bits below that exponent (25 on Hopper), what is left is summed exactly, and the
sum is cut toward zero to fp32. MMA-Sim (arXiv 2511.10909; microsoft/MMA-Sim, truncated fused dot product, F = 25 and 16
products of bf16 for mma and wgmma on Hopper); Khattak & Mikaitis, Accurate Models of NVIDIA Tensor Cores (arXiv
2512.07004; MATLAB-tensor-core, H100TC: 16 products, two extra alignment bits, no sticky bit, `rz`). Both say:

- A product's exponent is e_a + e_b and its significand lies in [1, 4): it is not normalised before it is aligned.
- Subnormal operands, accumulators and results are kept. A subnormal has the exponent -126 and no leading one.
- A zero has no exponent. MMA-Sim's newer code gives it -126 and H100TC bounds the largest exponent by -133: the same
  where anything, such as an accumulator that is not zero, has an exponent of -126 or more. Other sums are not modelled.

Not modelled: NaN, infinities, and the sign of a zero where every operand of the sum is zero. From 2^128 on, a sum is an
infinity here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NO_EXPONENT = -1000  # of a zero: below that of any product
EXACT = 56  # fraction bits: nothing is cut from products within 42 binades of the largest, or accumulators within 33


@dataclass(frozen=True)
class Model:
    """bits: of the fraction, below the largest exponent, 23 to 56. products: so many are summed at once, the next with
    that sum. nearest: a sum is rounded to nearest even instead of cut. normalised: products in [2, 4) have one exponent
    more.
    """

    bits: int = 25
    products: int = 16
    nearest: bool = False
    normalised: bool = False

    def __str__(self) -> str:
        words = [f"{self.bits} bits" if self.bits < EXACT else "all bits", "nearest" if self.nearest else "truncated"]
        words += [f"{self.products} products at once"] * (self.products != 16)
        return ", ".join(words + ["products normalised"] * self.normalised)


HOPPER = Model()
ALTERNATIVES = (
    *(Model(bits) for bits in (23, 24, 26, 27, EXACT)),
    *(Model(bits, nearest=True) for bits in (24, 25, 26, EXACT)),
    Model(normalised=True),
    Model(products=8),
    Model(24, products=8),  # Ampere
    Model(23, products=4),  # Volta
    Model(EXACT, products=1, nearest=True),  # a chain of fused multiply-adds in fp32
)


def modelled(a: Tensor, b: Tensor, c: Tensor, model: Model = HOPPER) -> Tensor:
    """fp32 [..., M, N]: a @ b.mT + c as the model adds, of bf16 a [..., M, K] and b [..., N, K] and fp32 c [..., M, N].

    K is a multiple of model.products. Operands are finite.
    """
    for start in range(0, a.shape[-1], model.products):
        step = slice(start, start + model.products)
        c = _step(a[..., :, None, step], b[..., None, :, step], c, model)
    return c


def _step(a: Tensor, b: Tensor, c: Tensor, model: Model) -> Tensor:
    (a_digits, a_exponents), (b_digits, b_exponents) = parts(a), parts(b)
    c_digits, c_exponents = (part[..., None] for part in parts(c))
    digits = a_digits * b_digits << 9  # of products in 2^-14, as the accumulator's in 2^-23
    exponents = torch.where(digits == 0, NO_EXPONENT, a_exponents + b_exponents)
    c_exponents = torch.where(c_digits == 0, NO_EXPONENT, c_exponents)
    tops = exponents + (digits.abs() >> 24) if model.normalised else exponents
    unit = torch.maximum(tops.amax(-1, keepdim=True), c_exponents) - model.bits  # all that is left: multiples of 2^unit

    def aligned(digits: Tensor, exponents: Tensor) -> Tensor:
        return digits.sign() * shifted(digits.abs(), exponents - 23 - unit)

    total = aligned(digits, exponents).sum(-1) + aligned(c_digits, c_exponents).squeeze(-1)
    return packed(total, unit.squeeze(-1), model.nearest)


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Signed digits and exponents, int64, of bf16 or fp32 x: x = digits * 2^(exponent - 7), for fp32 - 23."""
    width, fraction = (16, 7) if x.dtype == torch.bfloat16 else (32, 23)
    bits = x.view(torch.int16 if width == 16 else torch.int32).long()
    field = bits >> fraction & 255
    digits = (bits & (1 << fraction) - 1) + ((field > 0).long() << fraction)
    return torch.where(bits < 0, -digits, digits), field.clamp(min=1) - 127


def shifted(digits: Tensor, left: Tensor) -> Tensor:
    """digits * 2^left, cut to whole numbers, for digits of 0 and more."""
    return digits << left.clamp(0, 62) >> (-left).clamp(0, 63)


def packed(total: Tensor, unit: Tensor, nearest: bool) -> Tensor:
    """fp32 of total * 2^unit, both int64, cut toward zero or rounded to nearest even."""
    size = total.abs()
    last = torch.maximum(unit + length(size) - 24, torch.full_like(unit, -149))  # exponent of the result's last digit
    cut = last - unit
    if nearest:
        half = shifted(torch.ones_like(size), cut - 1)  # 0 where nothing is cut
        odd = shifted(size, -cut) & (half > 0)
        size = size + torch.where(half > 0, half - 1 + odd, 0)
    bits = (last + 149 << 23) + shifted(size, -cut)  # a leading one adds one to the exponent's field, as a carry does
    bits = torch.where(size == 0, 0, bits.clamp(max=0x7F800000))
    return torch.where(total < 0, bits - (1 << 31), bits).int().view(torch.float32)


def length(size: Tensor) -> Tensor:
    """Number of binary digits, 0 for 0."""
    found = torch.zeros_like(size)
    for step in (32, 16, 8, 4, 2, 1):
        more = size >> step > 0
        found, size = torch.where(more, found + step, found), torch.where(more, size >> step, size)
    return found + size
