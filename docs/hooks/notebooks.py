"""Notebooks as pages: their text, code and stored outputs. Nothing runs when the site is built."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError


def page_of(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the pictures that it shows by their file names."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = path.stem
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            heading = ([line for line in source.splitlines() if line.startswith("#")] or [heading])[-1].lstrip("# ")
        elif cell["cell_type"] == "code":
            parts.append(_listing("python", source))
            for content in _outputs(path, cell):
                if isinstance(content, str):
                    parts.append(_listing('text title="output"', content))
                else:
                    name = f"{path.stem}-{len(pictures) + 1}.png"
                    pictures[name] = content
                    parts.append(f'[![Figure {len(pictures)}, of the section "{heading}"]({name})]({name})')
    return "\n\n".join(parts) + "\n", pictures


def _outputs(path: Path, cell: dict[str, Any]) -> Iterator[str | bytes]:
    """Yield what a cell printed, as text, and what it drew, as PNG."""
    for output in cell["outputs"]:
        data = output.get("data", {})
        text = "".join(output.get("text", data.get("text/plain", "")))
        if "image/png" in data:
            yield base64.b64decode("".join(data["image/png"]))
        elif output["output_type"] == "error" or not text:
            raise PluginError(f"{path}: cell {cell['id']!r} has an output that is neither text nor PNG: run it again")
        else:
            yield text


def _listing(language: str, text: str) -> str:
    return f"`````{language}\n{text.rstrip()}\n`````"
