"""Whether a value is 1 / sqrt(x) rounded once to fp32: decided in whole numbers. It imports nothing of the lab."""

import numpy as np


def inputs(bits):
    """Every fp32 in [1, 4) whose mantissa has so many bits. At 4^k x the root is 2^-k of that at x."""
    return np.arange(0x3F800000, 0x40800000, 1 << (23 - bits), dtype=np.int32).view(np.float32)


def rounded_once(x, y):
    """Of fp32 x in [1, 4) and fp32 y: whether y is the nearest to 1 / sqrt(x).

    It is where 1 / sqrt(x) lies between the two midpoints beside y, M x 2^s: where M^2 x 4^s is below 1 at the lower,
    above 1 at the upper one. Both sides times a power of two are whole. No root lies on a midpoint: M is odd, times a
    power of two, and the square of it times x is no power of two unless x is one, whose root is y itself.
    """
    root, exponent = np.frexp(y)
    fits = (root > 0) & (exponent <= 1) & (exponent >= -2)  # x < 4: no right y is near 1/8 or 2
    fours = np.where(fits, np.ldexp(root, 26), 1 << 25).astype(np.int64)  # y = fours x 2^(exponent - 26), 4 a spacing
    lower = fours - np.where(fours == 1 << 25, 1, 2)  # below a power of two numbers lie twice as close
    significand = np.ldexp(x.astype(np.float64), 23).astype(np.int64)  # x = significand x 2^-23
    power = 52 + 23 - 2 * np.where(fits, exponent, 0).astype(np.int64)  # 1 at that scale is 2^power
    return fits & below(lower, significand, power) & ~below(fours + 2, significand, power)


def below(root, significand, power):
    """root^2 x significand < 2^power, by words of 24 bits: the product has 77 bits."""
    square = root * root
    low = (square & 0xFFFFFF) * significand
    high = (square >> 24) * significand + (low >> 24)
    return high < np.left_shift(1, power - 24)  # where high is equal, the product is not below
