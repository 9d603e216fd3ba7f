"""The documentation: its code runs, its site builds without a warning, and its pages are whole, in a browser too."""

from __future__ import annotations

import base64
import contextlib
import html
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from alone import alone
from checkout import ROOT
from stand_in_torchvision import working_torchvision

import analytic_precond as ap
from analytic_precond import testing

DOCS = ROOT / "docs"
pytestmark = pytest.mark.long  # the site is built, its code run, its pages looked at in a browser
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text() for path in sorted(DOCS.rglob("*.md"))}
WITH_CODE = [name for name, text in PAGES.items() if "```python" in text]
ELSEWHERE = {
    "distillation.md",
    "command-line.md",
    *(name for name in WITH_CODE if name.startswith("integrate/")),
}  # with tests of their own
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d+(?:\.(\d+))?(?:e([-+]\d+))?")


# code


@pytest.fixture(autouse=True)
def _quiet_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pages write files, draw random numbers and run networks too small for threads."""
    monkeypatch.chdir(tmp_path)
    with alone():
        yield


def run_page(name: str, namespace: dict[str, Any], **replaced: str) -> None:
    """Run a page's python blocks in order; a text block right after one is what it prints."""
    printed = None
    for number, (language, text) in enumerate(BLOCK.findall(PAGES[name])):
        if language == "python":
            for old, new in replaced.items():
                text = re.sub(old, new, text)
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(text, f"{name}, block {number}", "exec"), namespace)
            printed = output.getvalue()
        else:
            if language == "text" and printed is not None:
                assert_same_but_for_rounding(printed, text)
            printed = None


def assert_same_but_for_rounding(got: str, expected: str) -> None:
    """Compare words exactly, and numbers to one unit of their last digit: another processor adds in another order."""
    assert NUMBER.sub("#", got).split() == NUMBER.sub("#", expected).split(), got
    for a, b in zip(NUMBER.finditer(got), NUMBER.finditer(expected), strict=True):
        unit = 10.0 ** (int(b[2] or 0) - len(b[1] or ""))
        assert math.isclose(float(a[0]), float(b[0]), rel_tol=1e-9, abs_tol=1.01 * unit), (got, expected)


@pytest.mark.parametrize("name", sorted({*WITH_CODE} - ELSEWHERE - {"scale.md", "howto/lpips-offline.md"}))
def test_code_runs(name: str) -> None:
    run_page(name, {"__name__": name})


def test_code_of_the_lpips_page_runs() -> None:
    with working_torchvision():
        pytest.importorskip("lpips")
        run_page("howto/lpips-offline.md", {})


@pytest.mark.filterwarnings("ignore:.*CUDA is not available:UserWarning")
def test_code_of_the_page_on_scale_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one process of one, which torchrun and a job array would start, on the CPU."""
    started = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
    for key, value in {**started, "SLURM_ARRAY_TASK_ID": 3}.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    images = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    teacher = ap.GaussianDenoiser(1.0)
    namespace = {"teacher": teacher, "images": images, "network": teacher, "Path": Path, "os": os, **training_step()}
    try:
        run_page("scale.md", namespace, **{r"teacher, images = \.\.\.": ""})
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert Path("teacher.safetensors").is_file()


class TwoTimes(torch.nn.Module):
    """A network that looks at no time."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, c_t: torch.Tensor, c_s: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def training_step() -> dict[str, Any]:
    """Return what docs/distillation.md has made where the page on scale goes on."""
    layer = torch.nn.Linear(4, 4)
    student = ap.ConsistencyTrajectoryModel(TwoTimes(layer), ap.CTMPreconditioning())
    generator = torch.Generator().manual_seed(0)
    return {
        "student": student,
        "average": ap.exponential_moving_average(student, 0.999),
        "last_layer": layer.weight,
        "optimizer": torch.optim.RAdam(layer.parameters()),
        "x_0": torch.randn(8, 4, generator=generator),
        "noise": torch.randn(8, 4, generator=generator),
        "t": torch.full((8,), 0.5),
        "times": ap.sample_jump_times(8, ap.karras_noise_levels(6), generator=generator),
        "lpips": ap.squared_error,
    }


def test_blocks_are_code_that_runs_or_marked_as_what_does_not() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name, text in PAGES.items():
        languages = {language for language, _ in BLOCK.findall(text)}
        assert text.count("```") == 2 * len(BLOCK.findall(text)), name
        allowed = {"python", "text", "sh", "bash", "json"} | ({"diff"} if name.startswith("integrate/") else set())
        assert languages <= allowed, (name, languages)
        for language, block in BLOCK.findall(text):  # shell blocks do not run: what they name exists
            if language in ("sh", "bash"):
                for script in re.findall(r"(?<!-)\bpython (\w+/\S+\.py)", block):
                    assert (ROOT / script).is_file(), (name, script)
                for target in re.findall(r"^make (\w+)", block, flags=re.MULTILINE):
                    assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), (name, target)


def test_front_page_figure_says_what_its_caption_says(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples/front_page.py", "--output", tmp_path / "figure.png"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (tmp_path / "figure.png").is_file()
    caption = " ".join(PAGES["index.md"].split())
    first, second = zip(*(line.split()[-2:] for line in printed.splitlines()), strict=True)
    sentence = f"CTM {first[0]}, Analytic-Precond {first[1]}, least squares (ours) {first[2]}; for 1 → 0.1 it is"
    assert f"{sentence} {second[0]}, {second[1]} and {second[2]}" in caption, printed


# the reference


def test_reference_is_complete() -> None:
    described = [
        name for page, text in PAGES.items() if page.startswith("api/")
        for name in re.findall(r"^::: analytic_precond\.(\w+)$", text, flags=re.MULTILINE)
    ]  # fmt: skip
    listed = re.findall(r"`(\w+)`(?=,| \|)", PAGES["api/index.md"])
    for names, place in ((described, "on a page of docs/api"), (listed, "in docs/api/index.md")):
        assert len(names) == len(set(names)), place
        assert set(names) == set(ap.__all__), f"{set(names) ^ set(ap.__all__)}: every name of __all__ once {place}"
    page = PAGES["api/testing.md"]
    assert set(re.findall(r"^::: analytic_precond\.testing\.(\w+)$", page, re.MULTILINE)) == set(testing.__all__)


# the site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site; any warning is an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=quiet)
    assert result.returncode == 0, result.stdout + result.stderr
    return folder


class Page(HTMLParser):
    """What a page refers to, what can be referred to, and its text outside code and formulas."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.images_without_words: list[str] = []
        self.text: list[str] = []
        self._inside: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        self.anchors |= {values[key] for key in ("id", "name") if key in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(values["href"])
        elif "src" in values:
            self.loaded.append(values["src"])
            if tag == "img" and not values.get("alt"):
                self.images_without_words.append(values["src"])
        if tag in ("code", "pre", "script", "style", "math"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and tag == self._inside[-1]:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.text.append(data)


def test_pages_are_whole(site: Path) -> None:
    pages = {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 30
    for path, page in pages.items():
        name = path.relative_to(site)
        text = "".join(page.text)
        assert not re.search(r"\$|\\\(|\\\[|\\frac", text), (name, "a formula is not rendered")
        assert not page.images_without_words, name
        for url in page.loaded:
            assert not re.match(r"\w+:|//", url) or url.startswith("data:"), (name, url, "is loaded from elsewhere")
            assert (path.parent / url.split("?")[0]).exists(), (name, url)
        for url in page.links:
            if re.match(r"\w+:", url):
                continue
            file, _, anchor = url.partition("#")
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), (name, url)
            assert not anchor or target.suffix != ".html" or anchor in pages[target].anchors, (name, url)
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(?:https?:)?//", style.read_text()), style
    anchors = set[str]().union(*(page.anchors for page in pages.values()))
    assert {f"analytic_precond.{name}" for name in ap.__all__} <= anchors


def test_examples_of_docstrings_are_code(site: Path) -> None:
    pages = [path.read_text() for path in (site / "api").glob("*.html")]
    assert not any("<blockquote>" in page for page in pages)  # what becomes of >>> outside a section of examples
    assert not any(re.search(r"<code>[^<]*``", page) for page in pages)  # a colon made a type of a description
    prompts = sum(page.count('<span class="gp">&gt;&gt;&gt;') for page in pages)
    assert prompts > 100


def test_names_and_sections_become_links(site: Path) -> None:
    page = Page(site / "api/statistics.html")
    assert "noise-levels.html#analytic_precond.log_noise_levels" in page.links
    assert "../method.html#5-estimators" in page.links


def test_notebook_is_a_page_with_its_stored_outputs(site: Path) -> None:
    notebook = json.loads((ROOT / "examples" / "coefficient_curves.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    page = site / "repository" / "examples" / "coefficient_curves.ipynb.html"
    source = page.read_text()
    drawn = [base64.b64decode(output["data"]["image/png"]) for output in outputs if "data" in output]
    assert len(drawn) > 5
    images = [page.parent / name for name in re.findall(r'<img [^>]*src="(coefficient_curves[^"]+)"', source)]
    assert [image.read_bytes() for image in images] == drawn
    text = html.unescape(re.sub(r"<[^>]*>", "", source))
    printed = ["".join(output["text"]) for output in outputs if "text" in output]
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert printed
    assert [part for part in printed + code if part.rstrip() not in text] == []
    assert "repository/examples/coefficient_curves.ipynb.html" in Page(site / "index.html").links


def chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next(filter(None, map(shutil.which, names)), None)


def note_complaints(page: Any, complaints: list[str]) -> None:
    """Note what a browser's page reports, what it asks others for, and what is missing."""

    def requested(request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            complaints.append(f"{page.url}: asks for {request.url}")

    def failed(request: Any) -> None:
        if request.failure != "net::ERR_ABORTED":  # an icon that was still loading when the test went on
            complaints.append(f"{page.url}: {request.url} failed: {request.failure}")

    page.on("console", lambda message: complaints.append(f"{page.url}: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"{page.url}: {error}"))
    page.on("request", requested)
    page.on("requestfailed", failed)


@pytest.mark.long
@pytest.mark.skipif(chromium() is None, reason="no Chromium on this machine")
def test_pages_in_a_browser(site: Path) -> None:
    """Nothing is reported, loaded from elsewhere or wider than a telephone; formulas and pictures are there."""
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    backgrounds: dict[str, str] = {}
    looks = [(1280, "light"), (360, "dark"), (1280, "dark"), (360, "light")]
    paths = sorted(path for path in site.rglob("*.html") if path.name != "404.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for number, (width, scheme) in enumerate(looks):
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page = context.new_page()
            note_complaints(page, complaints)
            for path in paths if number < 2 else [site / "index.html", site / "method.html"]:
                page.goto(path.as_uri())
                seen = page.evaluate(LOOK)
                for key, bad in seen.items():
                    if key != "background" and bad:
                        complaints.append(f"{path.relative_to(site)} at {width}, {scheme}: {key}: {bad}")
                assert backgrounds.setdefault(scheme, seen["background"]) == seen["background"]
            context.close()
        browser.close()
    assert not complaints, "\n".join(complaints)
    assert backgrounds["light"] != backgrounds["dark"]


LOOK = """() => ({
    background: getComputedStyle(document.body).backgroundColor,
    overflow: Math.max(0, document.documentElement.scrollWidth - window.innerWidth),
    pictures: [...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).map(i => i.src),
    formulas: [...document.querySelectorAll("article math")].filter(m => !m.closest("details") &&
        m.getBoundingClientRect().height < 4).map(m => m.textContent),
})"""


# hooks


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formulas_become_mathml_or_an_error() -> None:
    from mkdocs.exceptions import PluginError

    page = SimpleNamespace(file=SimpleNamespace(src_uri="page.md"))
    convert = hook("formulas").on_page_content
    content = convert(r'<p><span class="arithmatex">\(a &lt; \Big\lVert x\Big\rVert\)</span></p>', page=page)
    assert re.fullmatch(r'<p><span class="formula"><math.*&#x0003C;.*&#x02016;.*</math></span></p>', content)
    for wrong in (r"x^", r"\nosuchcommand x"):
        with pytest.raises(PluginError, match=r"page\.md"):
            convert(rf'<span class="arithmatex">\({wrong}\)</span>', page=page)


def test_notebooks_show_no_output_that_would_be_lost(tmp_path: Path) -> None:
    from mkdocs.exceptions import PluginError

    def page_of(*outputs: dict[str, Any]) -> str:
        cells = [
            {"cell_type": "markdown", "source": ["# Title\n", "text"]},
            {"cell_type": "code", "id": "name", "source": "1 + 1", "outputs": outputs},
        ]
        (tmp_path / "some.ipynb").write_text(json.dumps({"cells": cells}))
        text, pictures = hook("notebooks").page_of(tmp_path / "some.ipynb")
        assert pictures == {}
        return str(text)

    result = {"output_type": "execute_result", "data": {"text/plain": ["2"], "text/html": "<b>2</b>"}}
    fence = "`````"
    code, shown = f"{fence}python\n1 + 1\n{fence}", f'{fence}text title="output"\n2\n{fence}'
    assert page_of(result) == f"# Title\ntext\n\n{code}\n\n{shown}\n"
    for lost in ({"output_type": "error", "ename": "E"}, {"output_type": "display_data", "data": {"text/html": "x"}}):
        with pytest.raises(PluginError, match="'name'"):
            page_of(lost)
