"""Questions as files: the answer is that of direct calls, in at most three rounds, and each error is one line."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import failure
from safetensors.torch import load_file, save_file
from torch import Tensor

import castpoint.harness.__main__ as cli
from castpoint.harness.fingerprint import known, rounds
from castpoint.harness.fingerprint.answer import Answer
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.variants.catalogue import HF

OUT = ".out.safetensors"
MINE = """
import torch

def my_kernel(x, weight, eps):
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)
"""


def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    wide = (x if residual is None else x + residual).float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm(x, weight, eps)


def fused(x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    return norm(x, weight, eps, residual)


def in_float64(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return (weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps))).to(x.dtype)


def wrong(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return norm(x, weight, eps) * (1.5 if len(x) == 1 else 1)


def rounded_rstd(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Searched at boundaries of its rstd, and held to controls beside them."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps).bfloat16() * weight.float()).to(x.dtype)


def linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (plain(x, norm_weight, eps).double() @ weight.double().T).to(x.dtype)


def only_1024(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.shape[-1] != 1024:
        raise ValueError("no kernel for this width")
    return norm(x, weight, eps)


def reply(folder: Path, fn: Callable, kind: str, optional: tuple[str, ...] = ()) -> None:
    """Answers what is not answered, as a user may; fn gets of the optional arguments those alone."""
    arguments = rounds.ARGUMENTS[kind]
    for path in sorted(folder.glob("round-*/???.safetensors")):
        out = path.with_suffix(OUT)
        if out.exists() or out.with_suffix(".txt").exists():
            continue
        given = load_file(path)
        values = [given[name] if name == "x" or "weight" in name else given[name].item() for name in arguments]
        try:
            made = fn(*values, **{name: given[name] for name in optional if name in given})
        except (ValueError, TypeError) as error:
            out.with_suffix(".txt").write_text(str(error))
        else:
            made = made if isinstance(made, tuple) else (made,)
            save_file({n: v.contiguous() for n, v in zip(rounds.OUTPUTS[kind], made, strict=True)}, out)


def by_rounds(
    folder: Path, fn: Callable, kind: str, optional: tuple[str, ...] = (), sizes: Sizes = ANY
) -> tuple[Answer, int]:
    """The answer, and how many rounds it took."""
    rounds.ask(folder, kind, sizes)
    for count in range(1, 5):
        reply(folder, fn, kind, optional)
        answer = rounds.go_on(folder)
        if isinstance(answer, Answer):
            return answer, count
    raise AssertionError("a fifth round")


def told(call: dict[str, str]) -> dict[str, str]:
    """But for the layout that is moved together with others."""
    return {**call, "what": re.sub(r"(, eps=\S+), [^,]+", r"\1", call["what"])}


def same(answer: Answer, direct: Answer) -> bool:
    """But for the time, layouts in memory, gates, and what optional arguments were found."""
    apart = ("memory", "argument", "weights")
    asked = [[told(call) for call in each.asked if call["about"] not in apart] for each in (answer, direct)]
    unasked = ("gaps between channels", "transposed weight", "sliced weight", "with gradients", "gate")
    unasked = (*unasked, "x [B, S, D] of longer rows")
    facts = [{k: v for k, v in each.facts.items() if k not in unasked} for each in (answer, direct)]
    bare = [dataclasses.replace(each, asked=[], facts={}, seconds=0.0) for each in (answer, direct)]
    bare = [dataclasses.replace(each, reason=each.reason.partition("; and so at ")[0]) for each in bare]
    bare[0] = dataclasses.replace(bare[0], reason=bare[0].reason.removeprefix("with no optional argument: "))
    return asked[0] == asked[1] and facts[0] == facts[1] and bare[0] == bare[1]


CHAIN = known.chain(HF, "eager")
README = Path(rounds.__file__).with_name("README.md")
SAID = {plain: "{} for a norm", norm: "({} where it adds a residual)", CHAIN: "{} for a chain"}


@pytest.mark.parametrize(
    ("fn", "kind", "optional", "status"),
    [
        (plain, "rmsnorm", (), "identified"),
        (in_float64, "rmsnorm", (), "undecided"),
        (wrong, "rmsnorm", (), "none"),
        (rounded_rstd, "rmsnorm", (), "identified"),
        (plain, "head_norm", (), "identified"),
        (norm, "rmsnorm", ("residual",), "identified"),
        (fused, "rmsnorm", ("residual",), "identified"),
        (CHAIN, "qkv", (), "identified"),
        (linear, "norm_linear", (), "identified"),
    ],
    ids=["norm", "in float64", "wrong", "rstd", "head norm", "optional residual", "residual", "chain", "projection"],
)
def test_rounds_answer_as_direct_calls_do(
    fn: Callable, kind: str, optional: tuple[str, ...], status: str, tmp_path: Path
) -> None:
    answer, count = by_rounds(tmp_path / "asked", fn, kind, optional)
    assert answer.status == status and count == 3 and same(answer, identify(fn, kind)), answer
    assert not [call for call in answer.asked if call["about"] == "memory"]
    assert answer.facts["gaps between channels"].startswith("not asked")
    assert answer.facts.get("gate", "").startswith("not asked") == (kind in ("rmsnorm", "head_norm"))
    if fn in SAID and kind != "head_norm":
        size = sum(path.stat().st_size for path in tmp_path.rglob("round-?/???.safetensors"))
        assert SAID[fn].format(f"{size / 1e6:.0f} MB") in " ".join(README.read_text().split())


def test_the_example_of_the_folder_runs_and_is_identified(tmp_path: Path) -> None:
    """In a Python of its own, that has torch and safetensors alone."""
    folder = tmp_path / "asked"
    said = rounds.ask(folder, "rmsnorm", ANY)
    assert said.startswith(f"round-1: 6 files in {folder / 'round-1'}")
    example = textwrap.dedent((folder / "README.txt").read_text().partition("for example:")[2])
    (tmp_path / "answer.py").write_text(MINE + example)
    for _ in range(3):
        subprocess.run([sys.executable, tmp_path / "answer.py"], cwd=folder, check=True)
        answer = rounds.go_on(folder)
    assert isinstance(answer, Answer) and answer.plans == ["hf"], answer


def test_a_width_that_is_refused_is_asked_for(tmp_path: Path) -> None:
    answer, count = by_rounds(tmp_path / "any", only_1024, "rmsnorm")
    assert answer.status == "error" and count == 1, answer
    assert answer.reason.startswith("the answer says: no kernel for this width; if it takes other sizes, --ask again")
    answer, count = by_rounds(tmp_path / "own", only_1024, "rmsnorm", sizes=Sizes(width=1024))
    assert answer.status == "identified" and count == 3
    refused = [call["what"] for call in answer.asked if call["result"].startswith("refused: the answer says: no")]
    assert "[1, 4096]" in refused and "[2, 1024]" not in refused


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose first round is answered, and whose second is written."""
    folder = tmp_path_factory.mktemp("rounds") / "asked"
    rounds.ask(folder, "rmsnorm", ANY)
    reply(folder, plain, "rmsnorm")
    assert isinstance(rounds.go_on(folder), str)
    return folder


def copy(source: str, place: str) -> Callable[[Path], object]:
    return lambda folder: (folder / place).write_bytes((folder / source).read_bytes())


def saved(place: str, metadata: dict[str, str] | None = None, **tensors: Tensor) -> Callable[[Path], object]:
    return lambda folder: save_file(tensors, folder / place, metadata)


def truncated(place: str) -> Callable[[Path], object]:
    return lambda folder: (folder / place).write_bytes((folder / place).read_bytes()[:-7])


ONES = torch.ones(64, 256, dtype=torch.bfloat16)
SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: None, "round-2 has 0 of 16 answers: {}/round-2/000.out.safetensors is missing"),
    "changed": (saved("round-1/001" + OUT, y=ONES), "{}/round-1/001.out.safetensors has changed since round-2 was"),
    "a changed question": (
        copy("round-1/001.safetensors", "round-1/000.safetensors"),
        "{}/round-1/000.safetensors is not what was asked: it has changed",
    ),
    "truncated": (truncated("round-2/003" + OUT), "{}/round-2/003.out.safetensors is no whole file of safetensors"),
    "empty": (lambda folder: (folder / f"round-2/003{OUT}").write_bytes(b""), "is no whole file of safetensors"),
    "other names": (saved("round-2/003" + OUT, out=ONES), "003.out.safetensors holds out, expected y"),
    "other shape": (
        saved("round-2/003" + OUT, y=ONES[:3].clone()),
        "003.out.safetensors answers another question: y has shape [3, 256], expected [64, 256]",
    ),
    "other question": (
        saved("round-2/003" + OUT, {"question": "another"}, y=ONES),
        "003.out.safetensors answers another question: its metadata `question` is not that of 003.safetensors",
    ),
    "no state": (lambda folder: (folder / "question.json").unlink(), "{} holds no question.json of castpoint identify"),
    "spoilt state": (lambda folder: (folder / "question.json").write_text("{}"), "{} holds no question.json of"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_folder_is_one_line(capsys, monkeypatch, second: Path, name: str, tmp_path: Path) -> None:
    spoil, words = SPOILT[name]
    folder = tmp_path / "asked"
    subprocess.run(["cp", "-r", second, folder], check=True)
    if name != "missing":
        reply(folder, plain, "rmsnorm")
    spoil(folder)
    assert words.format(folder) in failure(capsys, monkeypatch, "identify", "--answer", str(folder))


def test_the_options_of_rounds(capsys, monkeypatch, second: Path, tmp_path: Path) -> None:
    def fails(*arguments: object) -> str:
        return failure(capsys, monkeypatch, "identify", *map(str, arguments))

    assert "is there and not empty: give --ask a new folder" in fails("--ask", second, "--kind", "rmsnorm")
    new = tmp_path / "new"
    assert "rmsnorm takes no --heads" in fails("--ask", new, "--kind", "rmsnorm", "--heads", "4") and not new.exists()
    assert "--ask needs --kind" in fails("--ask", tmp_path / "new")
    assert "--expect is for an answer" in fails("--ask", tmp_path / "new", "--kind", "rmsnorm", "--expect", "hf")
    assert f"{second} asks of kind rmsnorm" in fails("--answer", second, "--kind", "qkv")
    assert f"{second} asks of kind rmsnorm" in fails("--answer", second, "--width", 512)
    assert not (tmp_path / "new").exists()
    state = json.loads((second / "question.json").read_text())
    assert state["kind"] == "rmsnorm" and [len(digests) for digests in state["rounds"]] == [6, 16]


def test_an_answer_is_expected_without_its_kind(capsys, monkeypatch, tmp_path: Path) -> None:
    answer, _ = by_rounds(tmp_path / "asked", plain, "rmsnorm")
    command = ["castpoint", "identify", "--answer", str(tmp_path / "asked"), "--expect"]
    monkeypatch.setattr(sys, "argv", [*command, answer.plans[0]])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 0
    assert "is not gemma: weight_offset=none against fp32" in failure(capsys, monkeypatch, *command[1:], "gemma")
