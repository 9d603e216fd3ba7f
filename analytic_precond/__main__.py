"""``python -m analytic_precond``: the command line (docs/command-line.md)."""

import sys

from .command_line import main

if __name__ == "__main__":
    sys.exit(main())
