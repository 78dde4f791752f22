"""Every callable of the survey, in the order of its table: public implementations, and those written from reports.

To add one, add a row to packages (imported), engines or libraries (a single file of a package), reports or other_kinds
(written here), with the answer that is right, and where that was read.
"""

from castpoint.harness.peers.engines import engine_rows
from castpoint.harness.peers.libraries import library_rows
from castpoint.harness.peers.other_kinds import other_rows
from castpoint.harness.peers.packages import package_rows
from castpoint.harness.peers.reports import report_rows
from castpoint.harness.peers.running import Implementation


def implementations() -> list[Implementation]:
    """All of them, whether installed or not. Imports no optional package."""
    return [*package_rows(), *engine_rows(), *library_rows(), *report_rows(), *other_rows()]
