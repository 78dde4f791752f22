"""python -m castpoint: the command, also from a copy of the tree that nobody installed."""

import sys
from pathlib import Path

# Run from the checkout, sys.path begins with it, and `import kernels` in an engine or in transformers would find ours.
_ROOT = Path(__file__).parent.parent
if (_ROOT / "harness").exists():
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != _ROOT]

from castpoint.harness.__main__ import main  # noqa: E402

main()
