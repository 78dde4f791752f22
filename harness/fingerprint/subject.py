"""What identify asks: a function, a program, questions in files, one recorded call. Loads torch when it asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from castpoint.harness.fingerprint.sizes import Sizes
from castpoint.harness.runs.errors import UserError

if TYPE_CHECKING:
    from castpoint.harness.fingerprint.answer import Answer
    from castpoint.harness.fingerprint.comparison import Comparison


@dataclass(frozen=True)
class Subject:
    """One of them: MODULE:FUNCTION, a program, a folder that questions go to or come from, a capture. call: how a norm
    among functions is called."""

    target: str = ""
    command: str = ""
    ask: Path | None = None
    answer: Path | None = None
    capture: Path | None = None
    call: str = ""

    def __str__(self) -> str:
        return self.target or self.command or str(self.answer)

    @property
    def kind(self) -> str:
        """That of questions that a folder holds, else empty."""
        from castpoint.harness.fingerprint import rounds

        return rounds.opened(self.answer).kind if self.answer else ""

    def asked(self, kind: str, device: str, time_limit_s: float, sizes: Sizes) -> Answer | str:
        """The fingerprint, or what to say of questions that were written."""
        from castpoint.harness.fingerprint import process, rounds

        if self.target:
            return process.identify_target(self.target, kind, device, time_limit_s, sizes, self.call)
        if self.command:
            return process.identify_command(self.command, kind, time_limit_s, sizes)
        if self.ask:
            return rounds.ask(self.ask, kind, sizes)
        assert self.answer is not None
        return rounds.go_on(self.answer, kind, sizes)


def compared(
    targets: tuple[str, str], kind: str, device: str, time_limit_s: float, sizes: Sizes, calls: list[str]
) -> Comparison:
    """Of two functions, programs or captures. calls: how each norm is called, or one way for both. Raises UserError for
    others, and where they cannot be called or read."""
    from castpoint.harness.fingerprint.comparison import compare_captures
    from castpoint.harness.fingerprint.kinds import known
    from castpoint.harness.fingerprint.process import compare_targets

    known(kind)
    if kind == "qk_norm_rope":
        raise UserError("compare takes the other kinds: qk_norm_rope is for identify")
    if len(calls) > 2:
        raise UserError(f"--call is given once for both or twice, one for each, not {len(calls)} times")
    first, second = (calls * 2)[:2] if calls else ("", "")
    for target, call in zip(targets, (first, second), strict=True):
        if call and ("{input}" in target or Path(target).suffix == ".safetensors"):
            raise UserError(f"--call is for functions, not for {target}: give it as '' there")
    captured = [Path(target).suffix == ".safetensors" for target in targets]
    if all(captured) and (kind or sizes != Sizes(heads=sizes.heads)):
        raise UserError("captures say all but --heads by themselves: leave out other options")
    if all(captured):
        return compare_captures(Path(targets[0]), Path(targets[1]), sizes)
    if any(captured):
        raise UserError("a capture is compared with a capture: it holds one call, and nothing else can be asked of it")
    if not kind and all("{input}" in target for target in targets):
        raise UserError("two programs need --kind, rmsnorm, head_norm, qkv, norm_linear: arguments do not tell it")
    return compare_targets(targets, kind, device, time_limit_s, sizes, (first, second))
