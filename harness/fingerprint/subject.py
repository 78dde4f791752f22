"""What identify asks: a function, a program, questions in files, one recorded call. Loads torch when it asks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from castpoint.harness.fingerprint.sizes import Sizes

if TYPE_CHECKING:
    from castpoint.harness.fingerprint.answer import Answer


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
