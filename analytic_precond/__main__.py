r"""``python -m analytic_precond``: the command line (docs/command-line.md)."""

from __future__ import annotations

import sys

from .command_line.main import main

if __name__ == "__main__":
    sys.exit(main())
