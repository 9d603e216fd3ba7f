"""A hook of MkDocs: names in the text link to their reference, docstrings to the sections of the method."""

import posixpath
import re
from typing import Any

from mkdocs.exceptions import PluginError

_NAME = re.compile(r"<code>(?:ap\.)?(\w+)(?:\(\))?</code>")
_SECTION = re.compile(r"docs/method\.md, sections? (\d+)")
_KEEP = re.compile(r"(<(?P<tag>a|pre|h1|h2|title)\b.*?</(?P=tag)>)", re.DOTALL)

_references: dict[str, str] = {}
_method: Any = None


def on_files(files: Any, **_: object) -> None:
    """Find out which page describes which name."""
    global _method
    _method = files.get_file_from_path("method.md")
    for file in files.documentation_pages():
        if file.src_uri.startswith("api/"):
            for path in re.findall(r"^::: (analytic_precond\.[\w.]+)", file.content_string, flags=re.MULTILINE):
                _references[path.rpartition(".")[2]] = f"{file.url}#{path}"


def on_post_page(output: str, *, page: Any, **_: object) -> str:
    """Add the links to the finished page, where there are none yet."""
    folder = posixpath.dirname(page.url)

    def link(url: str, text: str) -> str:
        path, anchor = url.split("#")
        return f'<a href="{posixpath.relpath(path, folder or ".")}#{anchor}">{text}</a>'

    def name(match: re.Match[str]) -> str:
        return link(_references[match[1]], match[0]) if match[1] in _references else match[0]

    def section(match: re.Match[str]) -> str:
        anchors = {item.title.split(".")[0]: item.id for item in _method.page.toc.items[0].children}
        if match[1] not in anchors:
            raise PluginError(f"{page.file.src_uri}: method.md has no section {match[1]}")
        return link(f"{_method.url}#{anchors[match[1]]}", match[0].replace("docs/method.md", "method"))

    head, body = output.split("<body", 1)
    pieces = _KEEP.split(body)  # text, kept, its tag, text, kept, ...
    pieces[::3] = [_SECTION.sub(section, _NAME.sub(name, piece)) for piece in pieces[::3]]
    del pieces[2::3]
    return head + "<body" + "".join(pieces)
