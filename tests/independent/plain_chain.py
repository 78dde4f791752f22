"""The chain once more, in NumPy, written from the definitions in words and from nothing else.

It imports nothing of the lab. Numbers are float64; a value is rounded to fp32 where it is formed, and to bf16 where
the plan's words say so, there by scaling to a whole number: no cast of a library is asked for bf16.
"""

import numpy as np

# What each plan rounds to bf16, and what else it does otherwise; `rtz` truncates, `proj-rtz` does so there alone.
PLANS = {
    "hf": "normed hidden proj head_normed unrotated cos_sin products out",
    "one-rounding": "hidden proj unrotated out",
    "separate-head-norm": "hidden proj head_normed unrotated cos_sin products out",
    "bf16-operand": "hidden out",
    "cast-after-matmul": "tf32 proj out",
    "fp32-tf32": "tf32 out",
    "fp32-tf32x3": "tf32x3 out",
    "fp32": "out",
    "deferred": "deferred hidden out",
    "folded": "folded out",
    "rstd-rounded": "rstd hidden proj head_rstd unrotated out",
    "bf16-statistics": "statistics variance rstd normed hidden proj head_rstd head_normed unrotated cos_sin products "
    "out",
    "truncating": "rtz normed hidden proj head_normed unrotated cos_sin products out",
    "gemma": "offset hidden proj unrotated cos_sin products out",
    "gemma-bf16-offset": "offset offset_bf16 hidden proj unrotated cos_sin products out",
}
TRUTH = None  # in place of a plan's words: nothing is rounded, not even to fp32


def cut(value, bits, to_whole):
    """value with so many significant bits, float64; to_whole: np.rint (nearest even) or np.trunc."""
    mantissa, exponent = np.frexp(value)
    return np.ldexp(to_whole(np.ldexp(mantissa, bits)), exponent - bits)


def fp32(value):
    return value.astype(np.float32).astype(np.float64)


class Rounding:
    """How one plan rounds: words of PLANS, or TRUTH."""

    def __init__(self, words):
        self.words = None if words is None else set(words.split() if isinstance(words, str) else words)

    def has(self, word):
        return self.words is not None and not self.words.isdisjoint({word, f"{word}-rtz"})

    def step(self, value):
        """What stands between two boundaries: in fp32 where each step is taken in `single` precision."""
        return fp32(value) if self.has("single") else value

    def __call__(self, value, boundary):
        if self.words is None:
            return value
        value = fp32(value)
        truncated = "rtz" in self.words and boundary != "cos_sin"  # RoPE's table comes from a library
        if f"{boundary}-rtz" in self.words or boundary in self.words and truncated:
            return cut(value, 8, np.trunc)
        return cut(value, 8, np.rint) if boundary in self.words else value


def summed(operand, weight):
    return operand @ weight.T


def chain(inputs, words, matmul=summed):
    """q, k, v, and k before its head norm (`k_proj`), each [T, heads, Dh] float64.

    inputs: x, norm_weight, qkv_weight, q_norm_weight, k_norm_weight as float64 arrays; num_q_heads, num_kv_heads, eps;
    weight_offset: weights are stored as w - 1; positions [T] and theta; residual and bias, or None.
    """
    r = Rounding(words)
    x, w_in = inputs["x"], applied(inputs["norm_weight"], inputs, r)
    if inputs.get("residual") is not None:
        x = r(x + inputs["residual"], "x")
    rstd = inverse_rms(x, inputs["eps"], r, "rstd")
    weight = inputs["qkv_weight"]
    if r.has("deferred"):
        operand = r(x * w_in, "hidden")
    elif r.has("folded"):
        operand, weight = x, cut(fp32(weight * w_in), 8, np.rint)
    else:
        operand = r(r(x * rstd, "normed") * w_in, "hidden")
    product = sum(matmul(part, weight) for part in operands_of_matmul(operand, r))
    if r.has("deferred") or r.has("folded"):
        product = r.step(product) * rstd
    if inputs.get("bias") is not None:
        product = r.step(product) + inputs["bias"]
    heads = [inputs["num_q_heads"], inputs["num_kv_heads"], inputs["num_kv_heads"]]
    proj = r(product, "proj").reshape(len(x), sum(heads), -1)
    q, k_proj, v = np.split(proj, np.cumsum(heads)[:-1], axis=1)
    q = head(q, applied(inputs["q_norm_weight"], inputs, r), inputs, r)
    k = head(k_proj, applied(inputs["k_norm_weight"], inputs, r), inputs, r)
    return {"q": r(q, "out"), "k": r(k, "out"), "v": r(v, "out"), "k_proj": k_proj}


def applied(weight, inputs, r):
    if not inputs["weight_offset"]:
        return weight
    weight = r(1 + weight, "")
    return cut(weight, 8, np.rint) if r.has("offset_bf16") else weight


def inverse_rms(value, eps, r, boundary):
    squares = r.step(value * value)
    if r.has("statistics"):
        squares = r(squares, "statistics")
    variance = r(np.mean(squares, axis=-1, keepdims=True), "variance")
    return r(1 / r.step(np.sqrt(r.step(variance + eps))), boundary)


def operands_of_matmul(value, r):
    high = cut(value, 11, np.trunc)  # tf32 holds 11 significant bits
    if r.has("tf32"):
        return [high]
    return [high, cut(value - high, 11, np.trunc)] if r.has("tf32x3") else [value]


def head(value, weight, inputs, r):
    value = r(value * inverse_rms(value, inputs["eps"], r, "head_rstd"), "head_normed") * weight
    if inputs.get("positions") is None:
        return value
    turn = phases(inputs["positions"], inputs["theta"], value.shape[-1], r)
    return rotated(value, np.cos(turn), np.sin(turn), r)


def phases(positions, theta, size, r):
    """Radians [T, size / 2]: each position times the frequencies theta^(-2i / size)."""
    steps = r(theta ** (-np.arange(0, size, 2) / size), "inv_freq")
    return r(np.outer(r(positions.astype(float), "position"), steps), "phase")


def rotated(value, cos, sin, r):
    """RoPE: pairs of channels half a head apart, turned by their angle, whose cos and sin are [T, Dh / 2]."""
    value = r(value, "unrotated")
    cos, sin = (r(factor, "cos_sin")[:, None, :] for factor in (cos, sin))
    first, second = np.split(value, 2, axis=-1)
    turned = (
        r(first * cos, "products") - r(second * sin, "products"),
        r(second * cos, "products") + r(first * sin, "products"),
    )
    return np.concatenate(turned, axis=-1)


# ---------------------------------------------------------------- measures


def attention_logits(q, k):
    """Causal q.k / sqrt(Dh) without positions, [Hq, T, T]; -inf above the diagonal."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    return np.where(np.tri(len(q), dtype=bool), logits, -np.inf)


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def relative_rms(actual, reference):
    """rms over tokens and heads of (rms of the head's error / rms of the head)."""
    return np.sqrt(np.mean(np.mean((actual - reference) ** 2, -1) / np.mean(reference**2, -1)))


def spacing(value):
    """Of bf16 numbers at |value|."""
    return np.ldexp(1.0, np.maximum(np.frexp(value)[1] - 8, -133))
