"""Planted faults in the norms that other projects' tests call, once more in NumPy: what their tolerances let pass."""

import numpy as np
import pytest
from plain_chain import Rounding, applied, cut, fp32, inverse_rms, rotated
from plain_norm import narrow
from test_gates import moved_by, rows, words_of

from castpoint.harness.conformance.tolerances import norms, tolerances

TESTS = {f"{test.name}, by itself": test for test in tolerances()}


class Away(Rounding):
    """As a plan rounds, but ties away from zero."""

    def __call__(self, value, boundary):
        if boundary not in self.words:
            return super().__call__(value, boundary)
        return cut(fp32(value), 8, lambda whole: np.trunc(whole + np.copysign(0.5, whole)))


def norm(words, given, fault=""):
    """The norm of x [..., D], rotated where there are angles, wrong as its name says."""
    x, weight, eps = given["x"], given["weight"], given["eps"]
    r = (Away if fault == "ties away from zero" else Rounding)(words | {"single"})
    eps *= {"head norm: eps dropped": 0, "head norm: eps doubled": 2}.get(fault, 1)
    seen = x
    if fault == "head norm: mean over one channel more":
        seen = np.concatenate([x, np.zeros_like(x[..., :1])], -1)
    if fault == "head norm: last channel left out of the mean":
        seen = np.concatenate([x[..., :-1], np.zeros_like(x[..., :1])], -1)
    rstd = inverse_rms(seen, eps, r, "head_rstd")
    rstd = narrow(rstd, 11, -24) if fault == "rstd in fp16" else rstd
    weight = applied(weight, {"weight_offset": r.has("offset")}, r)
    weight = np.roll(weight, 1) if fault == "weight of the channel before" else weight
    value = r.step(r(x * rstd, "head_normed") * weight)
    if "cos" in given:
        value = turned(value, given["cos"], given["sin"], r, fault)
    return written(r(value, "out"), fault)


def turned(value, cos, sin, r, fault):
    if fault == "angle of the first token for all":
        cos, sin = cos[:1], sin[:1]
    if fault == "turned the other way":
        sin = -sin
    if fault != "one of two products not rounded":
        return rotated(value, cos, sin, r)
    cos, sin = (r(angle, "cos_sin")[:, None] for angle in (cos, sin))
    value = r(value, "unrotated")
    first, second = np.split(value, 2, -1)
    beside = np.concatenate([-second * sin, first * sin], -1)
    return r(value * np.concatenate([cos, cos], -1), "products") + fp32(beside)


def written(value, fault):
    if fault == "one element in 500 zero":
        value.reshape(-1)[::500] = 0
    if fault == "last token not written":
        value[-1:] = 0
    if fault == "last token holds the one before":
        value[-1:] = value[-2:][:1]
    return value


def given_to(call):
    given = {"x": call.x.double().numpy(), "weight": call.weight.double().numpy(), "eps": call.eps}
    if call.cos_sin:
        half = call.x.shape[-1] // 2
        given |= {n: t.double().numpy()[:, 0, :half] for n, t in zip(("cos", "sin"), call.cos_sin, strict=True)}
    return given


@pytest.mark.parametrize("name", TESTS)
def test_what_a_norm_may_do_wrong(name):
    """Every fault of the study: how many elements lie farther off than atol + rtol times the right one.

    The count to ten in a million: where it is not equal, an order of fp32 sums moved up to six.
    """
    test, outside = TESTS[name], {}
    found = [row for row in rows("gates") if row["gate"] == name]
    words = words_of(test.plan)
    unrounded = words if test.stored == "bf16" else words - {"head_normed", "unrotated", "out"}
    for call in norms(test):
        given = given_to(call)
        allowed = norm(unrounded, given)
        for row in found:
            made = norm(moved_by(words, row["fault"]) or words, given, row["fault"])
            beyond = np.abs(made - allowed) > test.atol + test.rtol * np.abs(allowed)
            outside[row["fault"]] = outside.get(row["fault"], 0) + int(beyond.sum())
    for row in found:
        assert (row["verdict"] == "seen") == (outside[row["fault"]] > 0), row["fault"]
        assert abs(int(row["outside"]) - outside[row["fault"]]) <= 1e-5 * int(row["elements"]), row["fault"]
