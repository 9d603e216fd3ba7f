"""Run the notebook in a fresh kernel: ``python examples/refresh_notebook.py`` stores its outputs anew.

What differs from run to run or machine to machine (times, versions) is not stored.
"""

import argparse
import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent / "coefficient_curves.ipynb"


def main() -> None:
    """Read, run, strip, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK)
    parser.add_argument("--output", type=Path, help="default: the notebook itself")
    arguments = parser.parse_args()
    notebook = nbformat.read(arguments.notebook, as_version=4)
    os.environ.pop("JPY_SESSION_NAME", None)  # static figures are stored, no sliders
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=["--HistoryManager.enabled=False", "--log-level=ERROR"],  # kernels share no history file
    )
    client.execute()
    notebook.metadata.language_info = {"name": "python"}
    nbformat.write(notebook, arguments.output or arguments.notebook)


if __name__ == "__main__":
    main()
