"""A hook of MkDocs: what pages link to outside docs/ becomes a page of the site: code a listing, notebooks as read."""

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from notebooks import page_of

_FOLDER = "repository"
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
_ALWAYS = ("CHANGELOG.md",)  # linked from the navigation only


def on_files(files: Files, *, config: Any) -> Files:
    """Add a page for each file of the repository that can be reached by links."""
    root, docs = _places(config)
    waiting = [root / name for name in _ALWAYS]
    waiting += [path for file in files.documentation_pages() for path in _links(Path(file.abs_src_path))]
    seen: set[Path] = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file() or path.is_relative_to(docs) or not path.is_relative_to(root):
            continue
        seen.add(path)
        name, text, uri = path.relative_to(root).as_posix(), path.read_text(), _uri(path, config)
        if path.suffix in (".md", ".ipynb"):
            waiting += _links(path)
        if path.suffix == ".ipynb":
            text, pictures = page_of(path)
            for picture, content in pictures.items():
                files.append(File.generated(config, posixpath.join(posixpath.dirname(uri), picture), content=content))
        elif path.suffix != ".md":
            language = "python" if path.suffix == ".py" else "text"
            text = f"# {name}\n\n`````{language}\n{text}`````\n"
        files.append(File.generated(config, uri, content=text))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: object) -> str:
    """Point links that leave docs/, or its copy of the repository, to where the site has the file."""
    root, docs = _places(config)
    uri = page.file.src_uri
    inside = uri.startswith(f"{_FOLDER}/")
    source = root / posixpath.relpath(uri, _FOLDER) if inside else docs / uri

    def link(match: re.Match[str]) -> str:
        target = (source.parent / match[1]).resolve()
        if not target.is_file() or (target.is_relative_to(docs) and not inside):
            return match[1]
        return posixpath.relpath(_uri(target, config), posixpath.dirname(uri))

    return _LINK.sub(link, markdown)


def _links(path: Path) -> Iterator[Path]:
    return ((path.parent / target).resolve() for target in _LINK.findall(path.read_text()))


def _places(config: Any) -> tuple[Path, Path]:
    return Path(config.config_file_path).parent.resolve(), Path(config.docs_dir).resolve()


def _uri(path: Path, config: Any) -> str:
    root, docs = _places(config)
    if path.is_relative_to(docs):
        return path.relative_to(docs).as_posix()
    name = path.relative_to(root).as_posix().replace("README.md", "readme.md")  # README is a folder's index in MkDocs
    return f"{_FOLDER}/{name}" + ("" if path.suffix == ".md" else ".md")
