"""The tour runs on a few windows, and what Binder installs is what the tour imports."""

import json
import re
import sys
import tomllib
from types import SimpleNamespace

import matplotlib.pyplot
import nbformat
import yaml
from IPython.core.inputtransformer2 import TransformerManager

from replication.commands import order, readme
from replication.study.paths import ROOT

REFERENCE = json.loads((ROOT / "models/gated_deltanet/corpus.json").read_text(encoding="utf-8"))["python"]
TOUR = ROOT / "notebooks" / "tour.ipynb"
SMALLER = {"[slice(80)]": "[slice(8)]", "[slice(32)]": "[slice(2)]", "documents >= 8": "documents >= 1"}
SMALLER |= {".sample(200": ".sample(4", "[0.0, 0.25, 0.5, 1.0, 2.0]": "[0.0, 0.5]"}


def code_cells() -> list:
    return [cell for cell in nbformat.read(TOUR, as_version=4).cells if cell.cell_type == "code"]


def test_the_tour_runs(monkeypatch):
    code = "\n".join(cell.source for cell in code_cells()[1:])  # the first one is for Colab
    for whole, part in SMALLER.items():
        assert code.count(whole) == 1, whole
        code = code.replace(whole, part)
    monkeypatch.setattr(matplotlib.pyplot, "show", lambda: None)
    names = {}
    exec(compile(code, "tour", "exec"), names)
    matplotlib.pyplot.close("all")
    assert len(names["tests"]) == 4 and len(names["measured"]) == 2 * 5
    assert names["weights"].shape == (40, 40)
    before, after = names["probabilities"]
    assert after > 10 * before


def test_the_tour_has_pictures_and_is_no_page():
    assert TOUR.stem not in order.notebooks()
    cells = nbformat.read(TOUR, as_version=4).cells
    pictures = sum("image/png" in output.get("data", {}) for c in cells for output in c.get("outputs", []))
    assert pictures >= 7
    assert not any("def " in c.source for c in cells if c.cell_type == "code")


def test_binder_installs_what_the_locked_environment_has():
    names = [
        yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))
        for path in ("environment.yml", ".binder/environment.yml")
    ]
    python = [next(x for x in name["dependencies"] if str(x).startswith("python=")) for name in names]
    assert python == [f"python={REFERENCE}"] * 2
    pip = names[1]["dependencies"][-1]["pip"]
    assert "-c ../requirements.lock" in pip and "-e ..[replication]" in pip


def test_colab_and_binder_install_all_that_the_tour_imports():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["replication"]]
    installed = {re.match(r"[\w-]+", name)[0] for name in wanted} | {"writesae", "replication"}
    installed |= {"IPython"}  # of ipykernel
    install, *cells = (cell.source for cell in code_cells())
    names = re.findall(r"^(?:import|from) (\w+)", "\n".join(cells), re.M)
    assert set(names) - set(sys.stdlib_module_names) <= installed and "torch" in names and "ipykernel" in installed
    assert 'pip install --quiet --editable "writesae[replication]"' in install


def test_the_cell_for_colab_does_nothing_where_the_package_is():
    cell = code_cells()[0]
    assert cell.metadata["tags"] == ["nbval-skip"]
    code, ran = TransformerManager().transform_cell(cell.source), []
    shell = SimpleNamespace(system=ran.append, run_line_magic=lambda *line: ran.append(line))
    exec(code, dict(get_ipython=lambda: shell))
    assert not ran
    exec(code.replace('"writesae")', '"a_package_that_is_missing")'), dict(get_ipython=lambda: shell))
    assert [*map(type, ran)] == [str, tuple, tuple] and ran[0].startswith("git clone ")


def test_the_buttons_are_those_of_one_address():
    tour = nbformat.read(TOUR, as_version=4)
    assert readme.with_buttons(tour, readme.address()) == tour, "write them again: python -m replication readme"
    assert readme.buttons("") == ""
    there = readme.with_buttons(tour, "https://github.com/someone/some-name")
    first, install = (cell.source for cell in there.cells[:2])
    assert "](https://colab.research.google.com/github/someone/some-name/blob/main/notebooks/tour.ipynb)" in first
    assert "](https://mybinder.org/v2/gh/someone/some-name/HEAD?labpath=notebooks/tour.ipynb)" in first
    assert 'repository = "https://github.com/someone/some-name"' in install
    assert readme.with_buttons(there, "") == readme.with_buttons(tour, "")


def test_the_address_is_that_of_the_project(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    project = "[project]\nname = 'writesae'\n"
    (tmp_path / "pyproject.toml").write_text(project)
    assert readme.address() == "" and "appear here when" in readme.online(None, None)
    (tmp_path / "pyproject.toml").write_text(project + "[project.urls]\nRepository = 'https://github.com/a/b/'\n")
    assert readme.address() == "https://github.com/a/b" and "/gh/a/b/" in readme.online(None, None)
