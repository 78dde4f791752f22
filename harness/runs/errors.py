"""What a user did, told apart from what we did."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# What a system says of a folder that takes no file: full, over its quota, mounted read-only, another user's.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(ValueError):
    """Something that a user can mend, in one sentence that says what is wrong and what would be right.

    The command line prints it in one line and exits with 1. Whatever else is raised is a bug of ours and shows its
    traceback, so nothing raises this by accident: no library does, and no check of ours that no user can reach.
    """


@contextmanager
def mistakes(*kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Within it errors of those kinds are UserErrors: `about` and the reason, or, without it, what the error says."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{about}: {reason_of(error)}" if about else str(error.args[0])) from error


def reason_of(error: BaseException) -> str:
    """`ValueError: what it says`, in one line of at most 300 letters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Within it a folder that takes no more files is a UserError; every other error stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"{where} cannot be written ({error.strerror}): make room, or choose another folder") from error
