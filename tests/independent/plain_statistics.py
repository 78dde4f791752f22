"""llama.cpp's list of token-wise differences, its standard errors by leaving out each token in turn (the jackknife),
in NumPy. It imports nothing of the lab."""

import numpy as np
from plain_figures import log_softmax


def of_tokens(logits, base, ids):
    """A value for every token but the last: -log p of what follows by either, KL, whether the first choice is one."""
    p, q = log_softmax(logits)[:-1], log_softmax(base)[:-1]
    at = np.arange(len(ids) - 1), ids[1:]
    return np.array([-p[at], -q[at], np.sum(np.exp(q) * (q - p), -1), p.argmax(-1) == q.argmax(-1)])


def whole(values):
    """Statistic -> its value, of values [4, n]: those that have a standard error, and the correlation."""
    nll, base, kl, same = values
    change = 100 * (np.exp(-nll) - np.exp(-base))
    ppl, base_ppl = np.exp(nll.mean()), np.exp(base.mean())
    return {
        "Mean PPL(Q)": ppl,
        "Mean PPL(base)": base_ppl,
        "Mean ln(PPL(Q)/PPL(base))": np.log(ppl / base_ppl),
        "Mean PPL(Q)/PPL(base)": ppl / base_ppl,
        "Mean PPL(Q)-PPL(base)": ppl - base_ppl,
        "Mean KLD": kl.mean(),
        "Mean Δp": change.mean(),
        "RMS Δp": np.sqrt(np.mean(change**2)),
        "Same top p": 100 * same.mean(),
    }


def errors(values):
    """Statistic -> its standard error, by the spread of what it is without one of n tokens, times n - 1."""
    count = values.shape[1]
    left = [whole(np.delete(values, at, 1)) for at in range(count)]
    return {name: np.sqrt((count - 1) * np.var([each[name] for each in left])) for name in left[0]}


def part(values, share):
    """What that share of the values is not above: between two neighbours on a straight line."""
    ordered = np.sort(values)
    place = share * (len(values) - 1)
    below = int(place)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])
