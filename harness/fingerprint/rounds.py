"""A fingerprint without a connection: questions are files, answered anywhere, in at most three rounds.

The fingerprint is made again from its beginning each time, and calls that are answered return their answers. A call
that is not answered yet returns numbers that mean nothing and is noted, until what follows depends on it: all that is
noted by then is the next round.

A folder holds question.json (kind, sizes, the digest of every question), README.txt, and round-1/000.safetensors and so
on; the answer to it is round-1/000.out.safetensors, or 000.out.txt where the program refuses, with why.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint.answer import Answer
from castpoint.harness.fingerprint.blackbox import Pending, Refused, Way
from castpoint.harness.fingerprint.command import ARGUMENTS, OUTPUTS, Tensors, by_files, read, write
from castpoint.harness.fingerprint.kinds import KINDS, OPTIONAL
from castpoint.harness.fingerprint.norm import identify
from castpoint.harness.fingerprint.sizes import ANY, Sizes
from castpoint.harness.runs.errors import UserError, writing

MOST = 3
STATE = "question.json"
README = """Questions for a kernel of kind {kind}.

Run the kernel once on every file round-N/NNN.safetensors and write what it returns, as safetensors, to
round-N/NNN.out.safetensors. A question holds {inputs},
all contiguous and bf16 (a norm's weight and residual once in fp32), and eps{heads} as tensors of
one element and in the metadata. An answer holds {outputs}, in bf16 or fp32.
Where the kernel refuses a question, say why in round-N/NNN.out.txt instead.
An answer with the question's metadata `question` is noticed under another number. Then:
castpoint identify --answer FOLDER

In Python, for example:

    from pathlib import Path
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for path in sorted(Path(".").glob("round-*/???.safetensors")):
        out = path.with_suffix(".out.safetensors")
        if out.exists():
            continue
        given = load_file(path)
        question = safe_open(path, "pt").metadata()["question"]
        {call}
        save_file({saved}, out, {{"question": question}})
"""


@dataclass
class State:
    """Of a folder. rounds: digests of the questions, by their numbers. answers: digests of the files that answer the
    rounds before the last, which must stay as they are."""

    kind: str
    sizes: Sizes
    rounds: list[list[str]] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)

    def save(self, folder: Path) -> None:
        new = folder / f"{STATE}.new"
        new.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        new.replace(folder / STATE)


def opened(folder: Path) -> State:
    """The state of a folder. Raises UserError where it has none."""
    try:
        state = State(**json.loads((folder / STATE).read_text()))
        sizes = dict(state.sizes)
        sizes["heads"] = sizes["heads"] and tuple(sizes["heads"])
        state.sizes = Sizes(**sizes)
        assert state.kind in KINDS and 1 <= len(state.rounds) == len(state.answers) + 1 <= MOST
    except (OSError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise UserError(f"{folder} holds no question.json of castpoint identify --ask: start with that") from error
    return state


def ask(folder: Path, kind: str, sizes: Sizes) -> str:
    """Writes the first round into a new folder; what to say."""
    if beyond := sizes.beyond(kind):
        raise UserError(beyond)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there and not empty: give --ask a new folder, or go on with --answer {folder}")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.txt").write_text(_readme(kind))
    said = answered(folder, State(kind, sizes))
    assert isinstance(said, str), "nothing is answered yet"
    return said


def go_on(folder: Path, kind: str = "", sizes: Sizes = ANY) -> Answer | str:
    """answered of a folder. Raises UserError where it was asked of another kind or other sizes than those given."""
    state = opened(folder)
    if kind not in ("", state.kind) or sizes not in (ANY, state.sizes):
        raise UserError(f"{folder} asks of kind {state.kind}, with the sizes given to --ask: leave others out")
    return answered(folder, state)


def answered(folder: Path, state: State) -> Answer | str:
    """The answer, or what to say of the next round, which is written then."""
    replay = _Replay(state.kind)
    replies = [_take(folder, number, state, replay) for number in range(len(state.rounds))]
    try:
        fn = by_files(replay, state.kind, [name for name in OPTIONAL[state.kind] if name != "gate"])  # of more rounds
        answer = identify(fn, state.kind, "cpu", state.sizes, way=Way(True, replay.settle))
    except Pending:
        if len(state.rounds) == MOST:
            text = f"{folder} was begun by another version of castpoint: ask again, with --ask and a new folder"
            raise UserError(text) from None
        state.answers = replies
        return _write_round(folder, state, replay.asked)
    if answer.status == "error" and len(state.rounds) == 1:
        more = "if it takes other sizes, --ask again with --width, --head-dim, --heads or --tokens"
        answer = dataclasses.replace(answer, reason=f"{answer.reason}; {more}")
    if answer.status != "error" and "gate" in OPTIONAL[state.kind]:
        answer = dataclasses.replace(answer, facts=answer.facts | {"gate": "not asked in rounds: --command asks it"})
    return answer


def _write_round(folder: Path, state: State, asked: dict[str, Tensors]) -> str:
    name = f"round-{len(state.rounds) + 1}"
    with writing(folder):
        (folder / name).mkdir(exist_ok=True)
        for number, (digest, tensors) in enumerate(asked.items()):
            write(folder / name / f"{number:03}.safetensors", state.kind, tensors, question=digest)
        state.rounds.append(list(asked))
        state.save(folder)
    return (
        f"{name}: {len(asked)} files in {folder / name}. Answer each as {folder / 'README.txt'} says, "
        f"then castpoint identify --answer {folder}"
    )


def _take(folder: Path, place: int, state: State, replay: _Replay) -> list[str]:
    """Gives the replay a round's answers; their digests. Raises UserError for one that is missing, changed, no whole
    file, or of another question."""
    name, digests = f"round-{place + 1}", state.rounds[place]
    paths = [folder / name / f"{number:03}.out.safetensors" for number in range(len(digests))]
    missing = [path for path in paths if not path.exists() and not path.with_suffix(".txt").exists()]
    if missing:
        there = len(paths) - len(missing)
        lacks = f"{missing[0]} is missing, with no .txt in its place"
        raise UserError(f"{name} has {there} of {len(paths)} answers: {lacks}")
    found = []
    for number, (path, digest) in enumerate(zip(paths, digests, strict=True)):
        file = path if path.exists() else path.with_suffix(".txt")
        found.append(hashlib.sha256(file.read_bytes()).hexdigest())
        if place < len(state.answers) and state.answers[place][number] != found[-1]:
            raise UserError(f"{file} has changed since round-{place + 2} was asked because of it: put it back")
        try:
            replay.answers[digest] = _reply(folder / name / f"{number:03}.safetensors", file, state.kind, digest)
        except Fault as fault:
            raise UserError(str(fault)) from fault
    return found


def _reply(question: Path, file: Path, kind: str, digest: str) -> Tensors | str:
    """What that file answers: tensors, or why the program refuses."""
    inputs, _ = _read(question)
    if digest_of(inputs) != digest:
        raise Fault(f"{question} is not what was asked: it has changed")
    if file.suffix == ".txt":
        return " ".join(file.read_text(errors="replace").split())[:300] or "it does not say why"
    outputs, metadata = _read(file, OUTPUTS[kind])
    if metadata.get("question", digest) != digest:
        raise Fault(f"{file} answers another question: its metadata `question` is not that of {question.name}")
    for name, shapes in shapes_of(inputs, kind).items():
        shape = list(outputs[name].shape)
        if shape not in shapes:
            raise Fault(f"{file} answers another question: {name} has shape {shape}, expected {shapes[0]}")
    return outputs


def _read(path: Path, names: tuple[str, ...] | None = None) -> tuple[Tensors, dict[str, str]]:
    try:
        return read(path, names)
    except Fault as fault:
        raise Fault(f"{path} {fault}") from fault


def shapes_of(inputs: Tensors, kind: str) -> dict[str, list[list[int]]]:
    """The shapes that each output may have, the first as it should be."""
    if kind != "qkv":
        shape = [len(inputs["x"]), len(inputs["weight"])] if kind == "norm_linear" else list(inputs["x"].shape)
        return {name: [shape] for name in OUTPUTS[kind]}
    q, kv = (int(inputs[name]) for name in ("num_q_heads", "num_kv_heads"))
    tokens, size = len(inputs["x"]), len(inputs["q_norm_weight"])
    return {name: [[tokens, n, size], [tokens, n * size]] for name, n in zip("qkv", (q, kv, kv), strict=True)}


def digest_of(tensors: Tensors) -> str:
    """Of names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)} ".encode())
        digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class _Replay:
    """What by_files runs: an answer where there is one, else a number of its own, noted in asked. waits: whether a call
    since the last Pending has none."""

    kind: str
    answers: dict[str, Tensors | str] = field(default_factory=dict)
    asked: dict[str, Tensors] = field(default_factory=dict)
    waits: bool = False

    def __call__(self, tensors: Tensors) -> Tensors:
        digest = digest_of(tensors)
        if digest not in self.answers:
            self.waits = True
            self.asked.setdefault(digest, {name: value.clone() for name, value in tensors.items()})
            number = float(1 + list(self.asked).index(digest))
            shapes = shapes_of(tensors, self.kind)
            return {name: torch.full(either[0], number, dtype=torch.bfloat16) for name, either in shapes.items()}
        answer = self.answers[digest]
        if isinstance(answer, str):
            raise Refused(f"the answer says: {answer}")
        return answer

    def settle(self) -> None:
        if self.waits:
            self.waits = False  # the next path begins anew
            raise Pending


def _readme(kind: str) -> str:
    arguments = ARGUMENTS[kind]
    tensors = [name for name in arguments if name == "x" or "weight" in name]
    numbers = [name for name in arguments if name not in tensors]
    values = ", ".join(f'given["{name}"]' + ("" if name in tensors else ".item()") for name in arguments)
    outputs = OUTPUTS[kind]
    settings: dict[str, Any] = {
        "kind": kind,
        "inputs": ", ".join([*tensors, f"in some {' or '.join(OPTIONAL[kind])} too"]),
        "heads": "".join(f", {name}" for name in numbers[1:]),
        "outputs": ", ".join(outputs),
        "call": f"{', '.join(outputs)} = my_kernel({values})",
        "saved": "{" + ", ".join(f'"{name}": {name}' for name in outputs) + "}",
    }
    return README.format(**settings)
