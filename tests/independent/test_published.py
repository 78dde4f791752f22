"""Published figures of a bench, recomputed by plain_chain on the inputs of the lab, agree to the printed digits."""

import csv
import itertools
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from plain_chain import PLANS, TRUTH, attention_logits, chain, cut, relative_rms, softmax, spacing

from castpoint.harness.accuracy.streams import both_streams
from castpoint.harness.problems.drawn import synthetic_problem

RESULTS = Path(__file__).parents[2] / "results" / "cpu"
MODEL, LAYERS = "qwen3-0.6b", (0, 9, 27)


@cache
def rows(table):
    with open(RESULTS / f"{table}.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["status"] == "ok"]


def published(table, **key):
    """The rows in which these columns hold these words, of the newest run that has any."""
    found = [row for row in rows(table) if all(row[name] == str(word) for name, word in key.items())]
    return [row for row in found if row["run_id"] == max(row["run_id"] for row in found)]


def agree(published, own):
    """To the six digits that are printed."""
    return float(published) == pytest.approx(own, rel=6e-6, abs=1e-12)


def values_of(problem):
    names = ("x", "norm_weight", "qkv_weight", "q_norm_weight", "k_norm_weight")
    return {name: getattr(problem, name).double().numpy() for name in names}


@cache
def inputs(layer, offset, tokens, seed=0):
    problem = synthetic_problem(MODEL, layer, tokens, seed, weight_offset=offset)
    return values_of(problem) | {"num_q_heads": 16, "num_kv_heads": 8, "eps": 1e-6, "weight_offset": offset}


@cache
def run(plan, layer, tokens):
    """Of a plan's words, and of the truth beside it."""
    given = inputs(layer, plan.startswith("gemma"), tokens)
    return chain(given, PLANS[plan]), true_chain(layer, plan.startswith("gemma"), tokens)


@cache
def true_chain(layer, offset, tokens):
    return chain(inputs(layer, offset, tokens), TRUTH)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("plan", PLANS)
def test_errors(plan, layer):
    found = published("errors", plan=plan, layer=layer, backend="spec", reference="truth")
    assert [row["output"] for row in found] == ["k_proj", "q", "k", "v"]
    made, true = run(plan, layer, int(found[0]["tokens"]))
    for row in found:
        actual, reference = made[row["output"]], true[row["output"]]
        error = actual - reference
        assert agree(row["max_abs"], np.abs(error).max())
        assert agree(row["mean_abs"], np.abs(error).mean())
        assert agree(row["rms"], np.sqrt(np.mean(error**2)))
        assert agree(row["rel_rms"], relative_rms(actual, reference))
        assert agree(row["share_equal"], np.mean(actual == cut(reference, 8, np.rint)))
        ulps = np.sort(np.abs(error / spacing(reference))[(reference != 0) | (error == 0)])
        at_99 = ulps[math.ceil(0.99 * len(ulps)) - 1]
        assert agree(row["max_ulp"], ulps[-1]) and agree(row["p99_ulp"], at_99)
        assert agree(row["mean_ulp"], ulps[ulps <= at_99].mean())
        shrunk = np.mean(error * np.sign(reference)) / np.mean(np.abs(reference))
        assert float(row["signed_mean"]) == pytest.approx(shrunk, rel=6e-6, abs=1e-12)
        at = int(row["at_token"]), int(row["at_head"]), int(row["at_channel"])
        assert at == np.unravel_index(np.abs(error).argmax(), error.shape)


@pytest.mark.parametrize("plan", PLANS)
def test_histograms_of_ulps(plan):
    found = published("ulps", plan=plan, layer=0)
    made, true = run(plan, 0, int(published("errors", plan=plan, layer=0)[0]["tokens"]))
    ulps = np.abs(made["k"] - true["k"]) / spacing(true["k"])
    assert sum(float(row["share"]) for row in found) == pytest.approx(1, abs=1e-4)
    for row in found:
        share = np.mean((ulps >= float(row["ulp_from"])) & (ulps < float(row["ulp_to"])))
        assert float(row["share"]) == pytest.approx(share, rel=6e-6, abs=1e-12)


@pytest.mark.parametrize("plan", PLANS)
def test_what_attention_sees(plan):
    (row,) = published("amplification", plan=plan, layer=0)
    tokens = int(published("errors", plan=plan, layer=0)[0]["tokens"])
    made, true = run(plan, 0, tokens)
    for name, value in attention_errors(made, true).items():
        assert agree(row[name], value)
    assert agree(row["k_norm_max"], 96.5)
    assert agree(row["k_max_abs_after"], np.abs(made["k"] - true["k"]).max())
    assert agree(row["k_rel_rms_after"], relative_rms(made["k"], true["k"]))
    assert agree(row["k_rel_rms_before"], relative_rms(made["k_proj"], true["k_proj"]))


def attention_errors(made, true):
    logits, true_logits = (attention_logits(each["q"], each["k"]) for each in (made, true))
    error = (logits - true_logits)[np.isfinite(true_logits)]
    variation = np.abs(softmax(logits) - softmax(true_logits)).sum(-1) / 2
    return {
        "logit_rms_error": np.sqrt(np.mean(error**2)),
        "logit_max_error": np.abs(error).max(),
        "softmax_tv_mean": variation.mean(),
        "softmax_tv_max": variation.max(),
        "top_key_flips": np.mean(logits.argmax(-1) != true_logits.argmax(-1)),
    }


def test_gain_of_each_channel():
    """First order by the formula, and measured by a norm in float64 behind both."""
    made, true = run("hf", 0, int(published("errors", plan="hf", layer=0)[0]["tokens"]))
    weight = inputs(0, False, len(made["k"]))["k_norm_weight"]
    k, true_k = made["k_proj"], true["k_proj"]
    size, true_size = (np.sqrt(np.mean(value**2, -1, keepdims=True) + 1e-6) for value in (k, true_k))
    arriving = np.mean((k - true_k) ** 2, (0, 1))
    predicted = np.sqrt(np.mean((weight * (k - true_k) / true_size) ** 2, (0, 1)) / arriving)
    measured = np.sqrt(np.mean((weight * (k / size - true_k / true_size)) ** 2, (0, 1)) / arriving)
    found = published("channels", plan="hf", layer=0)
    assert len(found) == 128
    for row in found:
        channel = int(row["channel"])
        assert agree(row["k_norm_weight"], weight[channel])
        assert agree(row["gain_predicted"], predicted[channel])
        assert agree(row["gain_measured"], measured[channel])


# ---------------------------------------------------------------- other K-norm weights in place of a layer's own


def with_other_weights(given, k_norm, q_norm):
    """The inputs with the norm weights of those words. 129 / 128 is near 1 and has as many bits as bf16."""
    own, near_1 = given["k_norm_weight"], np.full(128, 129 / 128)
    there = np.arange(128) == np.abs(own).argmax()
    weights = {
        "own": own,
        "near 1": near_1,
        "all the largest": np.full(128, own[there]),
        "largest alone": np.where(there, own, near_1),
        "without the largest": np.where(there, near_1, own),
    }
    q_weight = near_1 if q_norm == "near 1" else given["q_norm_weight"]
    return given | {"k_norm_weight": weights[k_norm], "q_norm_weight": q_weight}, int(there.argmax())


@pytest.mark.parametrize("seed", [7])
def test_k_norm_weights(seed):
    found = published("k_norms", model=MODEL, layer=0, sample=seed)
    assert len(found) == 7
    for row in found:
        given, there = with_other_weights(inputs(0, False, int(row["tokens"]), seed), row["k_norm"], row["q_norm"])
        made, true = chain(given, PLANS["hf"]), chain(given, TRUTH)
        q_weight, k_weight = given["q_norm_weight"], given["k_norm_weight"]
        ulps = np.sort(np.abs(made["k"] - true["k"]) / spacing(true["k"]), axis=None)
        own = {name: value for name, value in attention_errors(made, true).items() if name in row}
        own |= {
            "channel": there,
            "k_norm_there": k_weight[there],
            "q_norm_there": q_weight[there] / np.sqrt(np.mean(q_weight**2)),
            "gain_predicted": np.sqrt(np.sum((q_weight * k_weight) ** 2) / np.sum(q_weight**2)),
            "k_max_abs": np.abs(made["k"] - true["k"]).max(),
            "k_rel_rms": relative_rms(made["k"], true["k"]),
            "k_share_equal": np.mean(made["k"] == cut(true["k"], 8, np.rint)),
            "k_p99_ulp": ulps[math.ceil(0.99 * ulps.size) - 1],
            "logit_rel_error": relative_to_own_mean(made, true),
            **parts_of_logits(made, true, there),
        }
        if row["weights_rank"]:  # neither is the same in all channels
            own["weights_rank"] = np.corrcoef(places(q_weight), places(k_weight))[0, 1]
        assert len(own) == 15 + ((row["k_norm"], row["q_norm"]) in MANY_WEIGHTS)
        for name, value in own.items():
            assert agree(row[name], value), name


MANY_WEIGHTS = {(arm, "own") for arm in ("own", "largest alone", "without the largest")}


def places(weight):
    """Of each |weight| among all of them; equal ones share the middle of theirs."""
    size = np.abs(weight)
    return np.searchsorted(np.sort(size), size) + np.searchsorted(np.sort(size), size, "right")


def relative_to_own_mean(made, true):
    """rms of the logits' error over the rms of the logits, each less its mean over the keys that a query sees."""
    logits, exact = (attention_logits(each["q"], each["k"]) for each in (made, true))
    spreads = []
    for query in range(logits.shape[1]):
        seen = exact[:, query, : query + 1]
        error = logits[:, query, : query + 1] - seen
        spreads.append([np.sum((v - v.mean(-1, keepdims=True)) ** 2) for v in (error, seen)])
    error, size = np.sum(spreads, axis=0)
    return np.sqrt(error / size)


def parts_of_logits(made, true, there):
    """A channel's part of the logits' squared error, by a logit of that channel alone; and the size of true terms."""

    def seen(q, k):  # [Hq, T, T, channels], by channel
        by_channel = np.einsum("qhd,khd->hqkd", q, np.repeat(k, q.shape[1] // k.shape[1], axis=1)) / np.sqrt(128)
        return by_channel[:, np.tri(len(q), dtype=bool)]

    heads = range(0, made["q"].shape[1], 2)  # two of q to one of k
    own = whole = terms = squares = 0.0
    for head in heads:
        q, k = slice(head, head + 2), slice(head // 2, head // 2 + 1)
        exact = seen(true["q"][:, q], true["k"][:, k])
        errors = seen(made["q"][:, q], made["k"][:, k]) - exact
        error = errors.sum(-1)
        own, whole = own + np.sum(errors[..., there] * error), whole + np.sum(error**2)
        squares, terms = squares + np.sum(errors**2), terms + np.mean(np.sum(exact**2, -1)) / len(heads)
    return {"channel_share": own / whole, "cross_share": 1 - squares / whole, "logit_terms": np.sqrt(terms)}


# ---------------------------------------------------------------- massive tokens


@pytest.mark.parametrize("plan", ["hf", "bf16-operand"])
@pytest.mark.parametrize("weights", ["random", "random, published stream"])
def test_massive_tokens(plan, weights):
    """The costs of a plan on either stream, of all tokens, of the massive one, and of the others."""
    found = published("streams", model="qwen3-1.7b", layer=3, seed=0, plan=plan, backend="spec", weights=weights)
    problem = both_streams("qwen3-1.7b", 3, int(found[0]["tokens"]), 0)["published" in weights]
    given = values_of(problem) | {"num_q_heads": problem.num_q_heads, "num_kv_heads": problem.num_kv_heads}
    given |= {"eps": 1e-6, "weight_offset": False}
    made, true = chain(given, PLANS[plan]), chain(given, TRUTH)
    logits = attention_logits(made["q"], made["k"]) - attention_logits(true["q"], true["k"])
    parts = {"all tokens": slice(0, None), "first token": slice(0, 1), "other tokens": slice(1, None)}
    assert [row["part"] for row in found] == list(parts)
    for row, part in zip(found, parts.values(), strict=True):
        k, true_k = made["k"][part], true["k"][part]
        assert agree(row["k_rel_rms"], relative_rms(k, true_k))
        assert agree(row["v_rel_rms"], relative_rms(made["v"][part], true["v"][part]))
        assert agree(row["k_equal"], np.mean(k == cut(true_k, 8, np.rint)))
        error = logits[:, :, part]
        assert agree(row["logit_rms_error"], np.sqrt(np.mean(error[np.isfinite(error)] ** 2)))
        assert agree(row["x_max"], given["x"][part].max()) and agree(row["x_min"], given["x"][part].min())


# ---------------------------------------------------------------- error budget, by walking through all orders


BUDGETS = ("hf", "one-rounding", "rstd-rounded", "folded", "fp32-tf32", "gemma-bf16-offset")


def rotated(given, first):
    """The inputs with tokens at first, first + 1, and so on: theta 1e6."""
    return given | {"positions": np.arange(first, first + len(given["x"])), "theta": 1e6}


@pytest.mark.parametrize(("plan", "first"), [*((plan, "") for plan in BUDGETS), ("one-rounding", 1000)])
def test_budget(plan, first):
    """What each rounding adds, averaged over all orders in which the roundings can be made."""
    found = published("budget", plan=plan, layer=0, backend="spec", rotated_from=first)
    tokens, names = int(found[0]["tokens"]), {"folded": "scale", "tf32": "matmul", "offset_bf16": "weight_offset"}
    given = inputs(0, plan.startswith("gemma"), tokens)
    given = rotated(given, first) if first else given
    true, none = chain(given, TRUTH), {"offset"} if first else {"offset", "unrotated", "cos_sin", "products"}
    players = [word for word in PLANS[plan].split() if word not in none]
    always = {"offset"} & set(PLANS[plan].split())

    @cache
    def squared(rounded):
        unfolded = {"deferred"} if "folded" in players and "folded" not in rounded else set()
        made = chain(given, always | unfolded | rounded)
        logits = [attention_logits(each["q"], each["k"]) for each in (made, true)]
        error = (logits[0] - logits[1])[np.isfinite(logits[1])]
        return np.array([relative_rms(made["k"], true["k"]) ** 2, np.mean(error**2)])

    parts = dict.fromkeys(players, 0.0)
    orders = list(itertools.permutations(players))
    for order in orders:
        for n, player in enumerate(order):
            added = squared(frozenset(order[: n + 1])) - squared(frozenset(order[:n]))
            parts[player] = parts[player] + added / len(orders)
    total = squared(frozenset(players))
    assert len(found) == 2 * (len(players) + 1)  # of fp32 arithmetic too
    for measure, column in (("k_rel_ms", 0), ("logit_ms", 1)):
        by_player = {row["player"]: row for row in found if row["measure"] == measure}
        for player, part in parts.items():
            row = by_player[names.get(player, player)]
            assert agree(row["total"], total[column])
            assert float(row["shapley"]) == pytest.approx(part[column], rel=6e-6, abs=2e-9 * total[column])
