"""The site: its Markdown, its links, and its pages in a real browser, which may ask no other server for anything."""

import functools
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml

from replication.commands import makers, order, readme, site
from replication.study.paths import ROOT

MISSING = [
    name for name in ("mkdocs", "material", "mkdocstrings", "latex2mathml") if not importlib.util.find_spec(name)
]
needs_the_extra = pytest.mark.skipif(bool(MISSING), reason=f"the extra `site` is not installed: {', '.join(MISSING)}")


# Markdown


@needs_the_extra
def test_formulas_become_mathml_outside_code():
    text = site.with_formulas("a $x_t$ b `$y$`\n\n$$\\alpha$$\n\n```\ncost $z$\n```\nprices of $5 and $6\n")
    assert text.count("<math") == 2 and '<div class="formula"><math' in text
    assert "`$y$`" in text and "cost $z$" in text and "<msub><mi>x</mi><mi>t</mi></msub>" in text


def test_links_lead_to_pages_of_the_site_or_become_text():
    text = "[a](../notebooks/05_replacement.ipynb#x) [b](../Makefile) [c](results.md) [d](https://e.f) ![](https://e.f/g.svg)"
    wanted = "[a](../notebooks/05_replacement.md#x) b [c](results.md) [d](https://e.f) "
    assert site.with_links(text, Path("docs")) == wanted
    assert site.with_links("`[a](../Makefile)`", Path("docs")) == "`[a](../Makefile)`"
    assert site.with_links("# T\n\n[![a](b.svg)](c)\n[![d](e)](f)\n\nx", Path()) == "# T\n\n\nx"


def test_a_figure_names_its_cell_and_its_rows(monkeypatch):
    line = site.sources("fig05_win_rates", order.notebooks())
    assert "](../notebooks/05_replacement.md#fig05_win_rates)" in line and "](../results/mini/headline.csv)" in line
    assert "replacement_trend.csv" not in line  # it is made below the figure
    assert re.search(r"commit [0-9a-f]{10}", line)
    monkeypatch.setattr(site, "address", lambda: "https://github.com/a/b")
    line = site.sources("fig05_win_rates", order.notebooks())
    assert re.search(r"commit \[([0-9a-f]{10})\]\(https://github.com/a/b/commit/\1\)", line)


def test_a_claim_leads_to_the_cell_that_makes_its_table():
    assert readme.measured("R1", "05_replacement").startswith("[05](notebooks/05_replacement.ipynb#headline")
    made = makers.cells("05_replacement")
    cells = nbformat.read(ROOT / "notebooks" / "05_replacement.ipynb", as_version=4).cells
    assert "headline.measure(study)" in cells[made["headline"]].source  # it is written in a function of the page
    assert "replacement.survey(study)" in cells[made["replacement_by_cell"]].source
    assert 'study.write("replacement_trend"' in cells[made["replacement_trend"]].source
    found = [number for page in order.notebooks() for number in makers.cells(page).values()]
    assert found.count(0) < 0.05 * len(found)


def test_the_workflow_publishes_what_make_site_builds():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "site.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["site"]["steps"]
    commands = [step["run"] for step in steps if "run" in step]
    assert commands[-1] == "make site" and any(".[site]" in command for command in commands)
    assert next(step["with"]["path"] for step in steps if "upload" in step.get("uses", "")) == "build/site"


# The built site


class Page(HTMLParser):
    """The links of a page, and the names that links to it may have."""

    def __init__(self, text):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.names |= {values[key] for key in ("id", "name") if values.get(key)}
        self.links += [values[key] for key in ("href", "src") if values.get(key)]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "replication", "site", "--folder", folder]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return folder


@needs_the_extra
def test_every_link_within_the_site_leads_somewhere(built):
    pages = {
        path: Page(path.read_text(encoding="utf-8")) for path in built.rglob("*.html") if path.name != "atoms.html"
    }
    assert len(pages) > 60
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link.startswith("/") and path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), f"{path.relative_to(built)}: {link}"
            if parts.fragment and target in pages and not parts.fragment.startswith("__"):
                assert unquote(parts.fragment) in pages[target].names, f"{path.relative_to(built)}: {link}"


@needs_the_extra
def test_every_page_has_its_notebook_and_the_api_every_module(built):
    for name in ("tour", *order.notebooks()):
        assert (built / "notebooks" / name / "index.html").is_file(), name
    api = (built / "api" / "writesae.edit" / "index.html").read_text(encoding="utf-8")
    assert 'id="writesae.edit.run_edited"' in api and "Return the edit that adds key value^T" in api


@pytest.fixture(scope="module")
def address(built):
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=built))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


PAGES = ["", "docs/method/", "docs/scorecard/", "notebooks/05_replacement/", "notebooks/tour/", "figures/", "atoms/"]


@needs_the_extra
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_pages_in_a_browser(address, chromium, width, scheme):
    """No error in the console, no request to another server, no page wider than a phone, and dark where asked."""
    view, told, asked = chromium.new_page(viewport=dict(width=width, height=800), color_scheme=scheme), [], []
    view.on("console", lambda message: told.append(message.text) if message.type in ("error", "warning") else None)
    view.on("pageerror", lambda error: told.append(str(error)))
    view.on("request", lambda request: asked.append(request.url))
    view.on("requestfailed", lambda request: told.append(request.url))
    for page in PAGES:
        view.goto(address + page, wait_until="networkidle")
        assert view.evaluate("document.documentElement.scrollWidth") <= width, page
        colour = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colour)[:3])) < 300) == (scheme == "dark"), page
    view.close()
    assert told == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []


@needs_the_extra
def test_the_search_finds_a_word(address, chromium):
    view = chromium.new_page(viewport=dict(width=1280, height=800))
    view.goto(address)
    view.locator(".md-search__input").fill("half-life")
    found = view.locator(".md-search-result__link").first
    found.wait_for(timeout=10_000)
    assert view.locator(".md-search-result__link").count() > 2
    view.close()
