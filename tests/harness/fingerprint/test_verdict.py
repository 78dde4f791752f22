"""Every callable of the survey has a right answer, written down beforehand; a spread of those that need no optional
package is asked here, all of them by `castpoint study survey`."""

import pytest

from castpoint.harness.fingerprint.answer import Answer
from castpoint.harness.fingerprint.kinds import KINDS
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.verdict import right_words, verdict
from castpoint.harness.peers.implementations import implementations
from castpoint.harness.peers.running import EAGER, Implementation

ROWS = implementations()
ASKED = (  # beside those of test_outside and test_identify, which are of the same formulas: a second each
    *("nn.RMSNorm", "nn.LayerNorm", "T5LayerNorm", "GptOssRMSNorm", "Gemma2RMSNorm", "MoshiRMSNorm"),
    *("Llama4TextRMSNorm", "Qwen3RMSNorm", "Llama4TextL2Norm", "written: residual sum kept for the variance"),
    *("written: fused_add_rms_norm in place", "written: 1 + w in bf16", "written: variance in bf16"),
    *("written: squares cut", "written: rstd in bf16", "written: x / sqrt", "written: rstd last"),
    *("written: eps as fp64, cast first", "written: all roundings cut", "written: ties away from zero"),
    *("written: ties up", "written: weights in bf16", "written: another kernel from 256 tokens on"),
    *("written: eps added to the sum", "written: odd widths wrong", "written: one token wrong"),
    *("written: two calls differ", "written: another shape", "written: writes into the weight", "written: NaN"),
    *("written: every head by the first one's root", "written: chain, cast after the matmul"),
    *("written: chain, sums of four parts in bf16", "written: all in bf16, by torch.rsqrt"),
)


def row_id(row: Implementation) -> str:
    return f"{row.name}, {row.kind}, {row.how}"


@pytest.mark.parametrize("row", [r for r in ROWS if r.name in ASKED and r.how == EAGER], ids=row_id)
def test_the_answer_is_the_one_that_was_written_down(row: Implementation) -> None:
    answer = identify(row.make("cpu"), row.kind)
    assert verdict(row.right, row.kind, answer) == "right", (row.right, answer)


def test_every_row_has_a_right_answer_and_says_where_it_was_read() -> None:
    assert len({row_id(row) for row in ROWS}) == len(ROWS)
    assert len({(row.name, row.kind) for row in ROWS}) >= 100
    assert set(ASKED) <= {row.name for row in ROWS}
    for row in ROWS:
        assert row.kind in KINDS and row.source, row
        if row.right.partition(":")[0] not in ("none", "error"):
            assert right_words(row.right, row.kind), row


WORDS = right_words("hf", "rmsnorm") | {"weight": "fp32"}


@pytest.mark.parametrize(
    "right, status, candidates, said",
    [
        ("hf", "identified", [WORDS], "right"),
        ("one-rounding", "identified", [WORDS], "wrong"),
        ("hf, root=sqrt", "identified", [WORDS], "wrong"),
        ("hf, root=sqrt", "identified", [WORDS | {"root": "rsqrt or sqrt"}], "right"),
        ("hf, weight=bf16-rne", "identified", [WORDS], "wrong"),
        ("hf", "undecided", [WORDS, WORDS | {"eps": "float64"}], "left open"),
        ("hf", "undecided", [WORDS | {"eps": "float64"}, WORDS | {"root": "sqrt"}], "wrong"),
        ("hf", "undecided", [WORDS, WORDS | {"normed": "fp32"}], "wrong"),
        ("hf", "none", [], "wrong"),
        ("hf", "error", [], "wrong"),
        ("none: LayerNorm", "none", [], "right"),
        ("none: L2 norm", "none", [], "wrong"),
        ("error: LayerNorm", "none", [], "wrong"),
        ("none", "identified", [WORDS], "wrong"),
    ],
)
def test_verdicts(right: str, status: str, candidates: list[dict[str, str]], said: str) -> None:
    answer = Answer(status, candidates, reason="all is explained if it is LayerNorm")
    assert verdict(right, "rmsnorm", answer) == said


def test_right_answers_that_say_nothing_are_refused() -> None:
    with pytest.raises(KeyError, match="unknown plan"):
        right_words("hg", "rmsnorm")
    with pytest.raises(KeyError, match="nomred is no word"):
        right_words("hf, nomred=fp32", "rmsnorm")
    assert right_words("one-rounding, hidden=fp32", "head_norm")["out"] == "fp32"
