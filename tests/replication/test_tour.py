"""The tour runs on a few windows, and what Binder installs is what the tour imports."""

import matplotlib.pyplot
import nbformat
import yaml

from replication.commands import order
from replication.study.paths import ROOT

TOUR = ROOT / "notebooks" / "tour.ipynb"
SMALLER = {"[slice(80)]": "[slice(8)]", "[slice(32)]": "[slice(2)]", "documents >= 8": "documents >= 1"}
SMALLER |= {".sample(200": ".sample(4", "[0.0, 0.25, 0.5, 1.0, 2.0]": "[0.0, 0.5]"}


def test_the_tour_runs(monkeypatch):
    code = "\n".join(c.source for c in nbformat.read(TOUR, as_version=4).cells if c.cell_type == "code")
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
    assert python == ["python=3.11"] * 2
    pip = names[1]["dependencies"][-1]["pip"]
    assert "-c ../requirements.lock" in pip and "-e ..[replication]" in pip
