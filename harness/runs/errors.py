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
def writing(where: Path) -> Iterator[None]:
    """Within it a folder that takes no more files is a UserError; every other error stays what it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise UserError(f"{where} cannot be written ({error.strerror}): make room, or choose another folder") from error
