"""A hook of MkDocs: formulas as MathML, which browsers draw themselves, without JavaScript or fonts from elsewhere."""

import html
import re
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
# what latex2mathml, or the part of MathML that browsers implement, does not know
_REPLACEMENTS = (
    (re.compile(r"\\[bB]igg?\\l(Vert|vert|angle)"), r"\\left\\l\1"),
    (re.compile(r"\\[bB]igg?\\r(Vert|vert|angle)"), r"\\right\\r\1"),
    (re.compile(r"\\arg\\min"), r"\\text{arg min}\\,"),
    (re.compile(r"_\{(skip|out|in|noise|data|rms|min|max)\b"), r"_{\\text{\1}"),  # docstrings leave \text out
    (re.compile(r"\\thinspace"), r"\\,"),
    # TeX's space around the name of a function
    (re.compile(r"(?<=[\w})])\s*(\\(?:ln|exp|log|sin|cos|tan|arctan|max|min)(?![a-z]))"), r"\\,\1"),
    (re.compile(r"(\\(?:ln|exp|log|sin|cos|tan|arctan)(?![a-z]))(?!\s*(?:\(|\^|_|\\,|\\[bB]ig|\\left))"), r"\1\\,"),
)
_PRIME = re.compile(r"<msup>(<mi>\w</mi>)<mi>&#x02032;</mi></msup>")  # the character is raised already
_LONG = 25  # letters: more do not fit a telephone


def on_page_content(content: str, *, page: Any, **_: object) -> str:
    """Replace the TeX that arithmatex marked, in pages and in docstrings."""

    def mathml(match: re.Match[str]) -> str:
        kind, _, text = match.groups()
        tex = html.unescape(text).strip()
        for pattern, replacement in _REPLACEMENTS:
            tex = pattern.sub(replacement, tex)
        try:
            converted = convert(tex, display="block" if kind == "div" else "inline")
        except Exception as error:
            raise PluginError(f"{page.file.src_uri}: {tex!r} is no formula: {error!r}") from error
        if "\\" in converted:
            raise PluginError(f"{page.file.src_uri}: latex2mathml does not know a command in {tex!r}")
        converted = _PRIME.sub(r'<mrow>\1<mo lspace="0" rspace="0">&#x2032;</mo></mrow>', converted)
        length = len(html.unescape(re.sub(r"<[^>]*>", "", converted)))
        return f'<{kind} class="formula{" long" if length > _LONG else ""}">{converted}</{kind}>'

    return _FORMULA.sub(mathml, content)
