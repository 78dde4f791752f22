"""The command that asks for a fingerprint, and callables that do not behave: each error is one sentence."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import castpoint.harness.__main__ as cli
from castpoint.harness.compiled.loading import Fault
from castpoint.harness.fingerprint import known
from castpoint.harness.fingerprint.answer import Answer, unmet
from castpoint.harness.fingerprint.blackbox import BlackBox
from castpoint.harness.fingerprint.kinds import KINDS, guessed_kind
from castpoint.harness.fingerprint.norm import identify
from castpoint.kernels.plan import RNE
from castpoint.variants.catalogue import HF
from castpoint.variants.eager import eager_norm

ROOT = Path(__file__).parents[3]
MODULE = """
import os, time, torch
def norm(x, weight, eps):
    print("a kernel that talks")
    x = x.float()
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).bfloat16()
def raises(x, weight, eps): raise RuntimeError("no kernel image\\nfor this device")
def shape(x, weight, eps): return norm(x, weight, eps)[:-1]
def dtype(x, weight, eps): return norm(x, weight, eps).half()
def nothing(x, weight, eps): return None
def insists(x, weight, eps):
    assert x.is_cuda, "x must be a CUDA tensor"
    return norm(x, weight, eps)
def writes(x, weight, eps): return norm(x.mul_(1.5), weight, eps)
def random(x, weight, eps): return norm(x, weight, eps) * (1 + (torch.rand(x.shape) < 0.01))
def alternates(x, weight, eps, calls=[]):
    calls.append(0)
    return norm(x, weight, eps) * (1 + len(calls) % 2)
def nan(x, weight, eps): return norm(x, weight, eps) / 0.0
def exits(x, weight, eps): raise SystemExit(0)
def dies(x, weight, eps): os.kill(os.getpid(), 9)
def hangs(x, weight, eps): time.sleep(600)
def other(x: torch.Tensor, mask: torch.Tensor, weight, eps): return norm(x, weight, eps)
number = 5
"""
VERDICTS = {
    "raises": "the callable raised RuntimeError: no kernel image for this device",
    "shape": "the callable returned shape [63, 256], expected [64, 256]",
    "dtype": "the callable returned torch.float16, expected torch.bfloat16 or torch.float32 throughout",
    "nothing": "the callable returned (NoneType), expected fn(x, weight, eps) -> y; x, y [T, D]",
    "insists": "x must be a CUDA tensor; if it wants a GPU, give --device cuda there, or here a function beneath that",
    "writes": "the callable writes into its inputs, and returns another tensor: give it copies",
    "alternates": "the callable is not deterministic: two calls on equal inputs differ in 100.000%",
    "random": "the callable is not deterministic: two calls on equal inputs differ in",
    "nan": "the callable returned NaN or infinity for",
    "exits": "the callable raised SystemExit: 0",
    "dies": "the callable ended its process (SIGKILL)",
    "hangs": "no answer within 8 s: the callable hangs, or needs a longer --time-limit",
    "missing": "cannot be imported: AttributeError",
    "other": "it takes (x, mask, weight, eps): mask is no name that is known, and weight is no second argument: give "
    "--call 'fn(out, x, w, eps)'",
    "number": "is of type int, which cannot be called",
}


DEFAULTS = """
import torch
torch.set_default_device("meta"), torch.set_default_dtype(torch.float64)
"""
Ask = Callable[..., tuple[int, dict[str, object]]]


@pytest.fixture
def run_identify(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ask:
    """The command in this process: the callable has one of its own. Exit status, and the line of JSON."""

    def ask(*arguments: str) -> tuple[int, dict[str, object]]:
        monkeypatch.setattr(sys, "argv", ["castpoint", "identify", *arguments, "--kind", "rmsnorm", "--json"])
        with pytest.raises(SystemExit) as status:
            cli.main()
        printed = capfd.readouterr()
        assert len(printed.out.splitlines()) == 1 and "Traceback" not in printed.err, printed.err
        return status.value.code, json.loads(printed.out)

    return ask


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "norms.py"
    path.write_text(MODULE)
    return path


@pytest.mark.parametrize(
    ("expected", "line"),
    [
        ("hf", ""),
        ("one-rounding", "is not one-rounding: normed=bf16-rne against fp32"),
        ("one-roundin", "error: unknown plan 'one-roundin': did you mean 'one-rounding'? plans are hf, "),
        (
            "deferred",
            "error: deferred applies rstd after the matmul, so that it has no norm of its own: use --kind qkv",
        ),
    ],
)
def test_a_plan_is_expected(
    expected: str, line: str, module: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    command = ["castpoint", "identify", f"{module}:norm", "--kind", "rmsnorm", "--expect", expected]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as status:
        cli.main()
    printed = capfd.readouterr()
    error = [text for text in printed.err.splitlines() if text != "a kernel that talks"]
    assert status.value.code == bool(line) and len(error) == bool(line) and bool(printed.out) == (not line)
    assert not line or line in error[0], error


def test_a_guessed_kind_that_the_plan_lacks_is_said(monkeypatch: pytest.MonkeyPatch, module: Path, capfd) -> None:
    monkeypatch.setattr(sys, "argv", ["castpoint", "identify", f"{module}:norm", "--expect", "deferred"])
    with pytest.raises(SystemExit) as status:
        cli.main()
    assert status.value.code == 1 and "deferred applies rstd after the matmul" in capfd.readouterr().err


def test_a_limit_may_be_infinite_and_defaults_of_a_file_end_with_it(tmp_path: Path, run_identify: Ask) -> None:
    path = tmp_path / "defaults.py"
    path.write_text(DEFAULTS + MODULE)
    code, answer = run_identify(f"{path}:norm", "--time-limit", "inf")
    assert code == 0 and "hf" in answer["plans"], answer


def test_an_error_is_no_plan(module: Path, run_identify: Ask) -> None:
    code, answer = run_identify(f"{module}:raises", "--expect", "hf")
    assert code == 1 and answer["status"] == "error"
    assert unmet(Answer("undecided", reason="between two"), "hf", "rmsnorm") == "undecided: between two"


@pytest.mark.parametrize("name", VERDICTS)
def test_what_a_callable_does_wrong_is_a_line_of_json(name: str, module: Path, run_identify: Ask) -> None:
    limit = ("--time-limit", "8") if name == "hangs" else ()
    code, answer = run_identify(f"{module}:{name}", *limit)
    assert code == 1 and answer["status"] == "error" and answer["candidates"] == []
    assert VERDICTS[name] in answer["reason"] and "\n" not in answer["reason"], answer["reason"]


def test_a_module_that_is_not_there(module: Path, run_identify: Ask) -> None:
    for target in ("no_such_module:fn", f"{module}x.py:fn", "without_a_colon"):
        code, answer = run_identify(target)
        assert code == 1 and answer["status"] == "error" and answer["reason"]


def test_the_json_of_an_answer(module: Path) -> None:
    """The command as a user starts it; the other tests call it."""
    start = time.monotonic()
    command = [sys.executable, "-m", "castpoint", "identify", f"{module}:norm", "--kind", "rmsnorm", "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (line,) = result.stdout.splitlines()
    code, answer = result.returncode, json.loads(line)
    fields = "status candidates share_equal runner_up_share_equal nearest reason plans asked facts seconds kind".split()
    assert code == 0 and list(answer) == fields and time.monotonic() - start < 30
    assert answer["status"] == "identified" and answer["candidates"][0]["normed"] == RNE and answer["seconds"] < 10
    assert known.expected(HF, "rmsnorm").items() <= answer["candidates"][0].items()
    assert (
        answer["plans"] == ["hf"] and len(answer["asked"]) > 25 and {c["result"] for c in answer["asked"]} == {"same"}
    )


UNKNOWN = """
import torch, triton, triton.language as tl
@triton.jit
def kernel(x_ptr, y_ptr, D, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * D + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs).to(tl.float32)
    y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(y_ptr + offs, y.to(tl.bfloat16))
def unknown(x, weight, eps):
    y = torch.empty_like(x)
    kernel[(len(x),)](x, y, x.shape[1], BLOCK=256)
    return y
def own(x, weight, eps): raise NotImplementedError("only for CUDA")
"""


def test_an_instruction_that_is_not_known_here_is_not_the_callables_fault(tmp_path: Path, run_identify: Ask) -> None:
    path = tmp_path / "unknown.py"
    path.write_text(UNKNOWN)
    code, answer = run_identify(f"{path}:unknown")
    assert code == 1 and answer["reason"].startswith("its Triton kernel cannot be run on a CPU: "), answer
    assert "tanh.approx.f32" in answer["reason"] and "\\n" not in answer["reason"]
    code, answer = run_identify(f"{path}:own")
    assert answer["reason"].startswith("the callable raised NotImplementedError: only for CUDA; if it wants a GPU, ")


def test_a_signature_that_raises_tells_nothing() -> None:
    class Norm:
        @property
        def __signature__(self) -> None:
            raise RuntimeError("made later")

        def __call__(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return eager_norm(x, weight, eps, weight_offset=False)

    assert "hf" in identify(Norm(), "rmsnorm").plans
    with pytest.raises(Fault, match="give --kind"):
        guessed_kind(Norm())


def test_flat_heads_are_viewed_by_head() -> None:
    def fn(*arguments: object) -> list[Tensor]:
        return [output.flatten(1) for output in known.chain(HF, "eager")(*arguments)]

    assert identify(fn, "qkv").plans == ["hf"]
    answer = identify(lambda *arguments: [output[:, :-1] for output in fn(*arguments)], "qkv")
    assert answer.reason == "the callable returned shape [64, 255], expected [64, 2, 128]"


def test_a_chain_with_other_arguments_is_told_what_to_take() -> None:
    def fn(x: Tensor, weight: Tensor, q_norm: Tensor, k_norm: Tensor, heads: int) -> None:
        """Neither those arguments nor their names."""

    reason = identify(fn, "qkv").reason
    assert reason == (
        f"the callable takes (x, weight, q_norm, k_norm, heads), it must take {KINDS['qkv']}: wrap it in one"
    )

    def inside(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        raise TypeError("unsupported operand")

    assert identify(inside, "rmsnorm").reason == "the callable raised TypeError: unsupported operand"


def test_a_callable_may_use_one_buffer_again_and_again() -> None:
    buffer = torch.empty(64, 256)

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y = eager_norm(x, weight, eps, False).float()
        return buffer.copy_(y) if y.shape == buffer.shape else y

    assert identify(fn, "rmsnorm").status == "identified"


def test_two_identifications_agree_and_leave_the_random_state_alone(two_threads: None) -> None:
    torch.manual_seed(1)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    start = time.process_time()
    answers = [identify(known.spec_norm(HF), "rmsnorm") for _ in range(2)]
    first, second = (dataclasses.replace(answer, seconds=0.0) for answer in answers)
    assert first == second and torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    assert time.process_time() - start < 40  # of two cores: ten seconds each by the clock


def test_a_callable_runs_on_as_many_threads_as_it_was_given(two_threads: None) -> None:
    """Which may decide in which order a matmul adds. What is computed beside it takes one: with a second on a busy
    machine a norm took 22 s, not 4."""
    threads = set()

    def fn(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        threads.add(torch.get_num_threads())
        return eager_norm(x, weight, eps, False)

    def pair(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return fn(q, q_weight, eps), fn(k, k_weight, eps)

    assert {identify(fn, "rmsnorm").status, identify(pair, "qk_norm_rope").status} == {"identified"}
    assert threads == {2} and torch.get_num_threads() == 2


def test_kinds_and_callables_are_checked() -> None:
    with pytest.raises(ValueError, match="kind must be one of rmsnorm, head_norm, qkv"):
        BlackBox(lambda: None, "layernorm")
    with pytest.raises(ValueError, match="is not callable"):
        BlackBox(5, "rmsnorm")
