"""Several processes that ask for the same kernels: one compiles what the others wait for."""

from __future__ import annotations

import errno
import fcntl
import time
import weakref
from typing import IO

from triton.runtime.cache import FileCacheManager

PATIENCE = 10.0  # seconds that a process waits for another, which may have less of a core, before it compiles by itself
_claims = weakref.WeakSet[IO[str]]()  # of this process


class Claimed(FileCacheManager):
    """Triton's cache of one kernel, which is claimed where it is not there. The claim ends with this object, which the
    compiler drops when it is done; when the process asks for another kernel, though it handles that one's failure; or
    with the process."""

    def get_group(self, filename: str) -> dict[str, str] | None:
        for claim in [*_claims]:
            claim.close()
        found, until = super().get_group(filename), time.monotonic() + PATIENCE
        if found is None and self.lock_path:
            self.claim = open(self.lock_path, "w")
            _claims.add(self.claim)
            while not _taken(self.claim) and time.monotonic() < until:
                time.sleep(0.01)
            found = super().get_group(filename)
        return found


def _taken(file: IO[str]) -> bool:
    """Whether the lock is this process's, of which no fork has a part, or there is none on this file system."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True
