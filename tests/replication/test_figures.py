"""The plotting helpers, compared with what they draw; the index of figures, compared with the files."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from replication import plots
from replication.commands import order

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "figures" / "README.md"
SCREENSHOTS = {"atoms_browser"}


@pytest.fixture
def axes():
    figure, made = plt.subplots()
    yield made
    plt.close(figure)


@pytest.fixture
def table():
    """Two groups at three categories. The rows are not sorted."""
    rows = [(x, g, len(x) + (g == "b") / 2) for g in "ba" for x in ("ccc", "a", "bb")]
    frame = pd.DataFrame(rows, columns=["x", "group", "value"])
    return frame.assign(low=frame.value - 1, high=frame.value + 3)


BARS = ("value", "low", "high")


def drawn(axes):
    """label -> (x, y, ends of the error bars), for each set of points."""
    found = {}
    for container in axes.containers:
        points, _, bars = container.lines
        ends = np.array([line.get_segments() for line in bars])[0]
        x, y = np.asarray(points.get_data(), dtype=float)
        found[container.get_label()] = (x, y, ends)
    return found


def test_a_panel_puts_every_point_at_its_category_and_groups_side_by_side(axes, table):
    plots.panel(axes, table, "x", "group", BARS, dict(a="red", b="blue"), order=["a", "bb", "ccc"], width=0.2)
    points = drawn(axes)
    assert list(points) == ["a", "b"]
    for name, shift in (("a", -0.1), ("b", 0.1)):
        x, y, ends = points[name]
        assert x == pytest.approx(np.array([2, 0, 1]) + shift)
        assert y == pytest.approx(table[table.group == name].value.to_numpy())
        assert ends[:, 0, 1] == pytest.approx(y - 1) and ends[:, 1, 1] == pytest.approx(y + 3)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "bb", "ccc"]


def test_a_panel_leaves_other_categories_out_and_spreads_what_shares_one(axes, table):
    twice = pd.concat([table, table.assign(value=table.value + 0.25)], ignore_index=True)
    plots.panel(axes, twice, "x", "group", BARS, dict(a="red", b="blue"), order=["bb"], width=0.4, step=0.1)
    x, y, _ = drawn(axes)["b"]
    assert x == pytest.approx([0.15, 0.25]) and y == pytest.approx([2.5, 2.75])


def test_the_second_grouping_column_decides_the_marker(axes, table):
    both = pd.concat([table.assign(way="one"), table.assign(way="two")])
    plots.panel(axes, both, "x", ["group", "way"], BARS, dict(a="red", b="blue"), label="{} by {}", horizontal=True)
    looks = {c.get_label(): (c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers}
    assert looks == {
        "a by one": ("red", "o"),
        "a by two": ("red", "s"),
        "b by one": ("blue", "o"),
        "b by two": ("blue", "s"),
    }
    x, y, ends = drawn(axes)["a by one"]
    assert x == pytest.approx(table[table.group == "a"].value.to_numpy())
    assert np.round(y) == pytest.approx([0, 1, 2])
    assert ends[:, 0, 0] == pytest.approx(x - 1)


def test_an_interval_beside_its_point_is_drawn_up_to_the_point(axes):
    plots.with_interval(axes, [0.0], np.array([1.0]), np.array([1.5]), np.array([2.0]))
    _, _, ends = drawn(axes)[axes.containers[0].get_label()]
    assert ends[0][:, 1] == pytest.approx([1.0, 2.0])


def test_half_lives_that_are_all_infinite_are_drawn_all_the_same(axes, tmp_path):
    table = pd.DataFrame(dict(half_life_median=[np.inf, np.inf], sigma1_over_sigma2=[2.0, 3.0]))
    assert [plots.scale(table, name) for name in table] == ["linear", "linear"]
    axes.plot(table.half_life_median, table.sigma1_over_sigma2, "o")
    axes.set(xscale=plots.scale(table, "half_life_median"), yscale="log")
    plots.save(axes.figure, "cells", tmp_path)
    assert plots.scale(table.assign(half_life_median=[np.inf, 3.0]), "half_life_median") == "log"


def test_predictors_of_one_value_do_not_hide_one_another(axes):
    rows = [(name, eps, -5.0, -6.0, 0.5) for name in plots.PREDICTOR for eps in (0.1, 1.0)]
    summary = pd.DataFrame(rows, columns=["predictor", "eps", "r2", "low", "high"])
    plots.r2_curves(axes, summary, "r2", "low", "high")
    curves = [line.get_data() for line in axes.lines]
    assert all(y == pytest.approx([-1, -1]) for _, y in curves)  # clipped at the floor
    starts = np.log10([x[0] for x, _ in curves])
    assert np.diff(starts) == pytest.approx([0.024] * 5) and starts.mean() == pytest.approx(-1)


def test_levels_mark_the_lines_that_have_them(axes):
    table = pd.DataFrame(
        dict(host=["h"] * 4, target=["state", "state", "write", "write"], reading=["x", "y", "x", "x"])
    )
    plots.levels(axes, table, dict(host=["h"], target=["state", "write"], reading=["x", "y"]))
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1], [2, 3], [0, 2, 3], [1]]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    assert names == ["SAE of states", "SAE of writes", "read by x", "read by y"]


def test_the_same_figure_gives_the_same_files(tmp_path):
    for name in ("one", "two"):
        plots.style()
        figure, axes = plt.subplots()
        axes.plot([1, 2], label="x")
        plots.save(figure, name, tmp_path)
        plt.close(figure)
    for kind in ("png", "pdf"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()


def test_a_saved_figure_is_fit_for_print(tmp_path):
    figure, axes = plt.subplots(1, 2, figsize=(11, 3))
    axes[0].plot([0, 1], label="gated_deltanet, matched_norm")
    axes[0].legend(fontsize=4)
    axes[0].set_title("a mamba2_like name", fontsize=5)
    axes[1].set_xticks([0, 1], ["mean_write", "rwkv7"], fontsize=6)
    for _ in range(2):  # saved twice, lettered once
        plots.save(figure, "wide", tmp_path)
    assert figure.get_size_inches().tolist() == [7, 3]
    assert [[text.get_text() for text in a.texts] for a in axes] == [["a"], ["b"]]
    assert axes[0].get_legend().get_texts()[0].get_text() == "Gated DeltaNet, native norm"
    assert axes[0].get_title() == "a mamba2_like name"
    assert [x.get_text() for x in axes[1].get_xticklabels()] == ["mean write", "RWKV-7"]
    assert min(text.get_fontsize() for text in figure.findobj(plt.Text) if text.get_text()) == 8
    plt.close(figure)


def test_names_stand_for_keys_once():
    assert plots.named("amplitude coefficient") == "amplitude own coefficient"
    assert plots.named(plots.named("SAE of states, coefficient")) == "SAE of states, own coefficient"
    assert plots.named("coefficient of variation, my_gamma, $gamma$") == "coefficient of variation, my_gamma, $gamma$"
    assert plots.variant_name("bilinear+rank1+batch_topk") == "bilinear, rank 1, BatchTopK"


def test_a_figure_says_where_it_comes_from(tmp_path):
    figure, _ = plt.subplots()
    for name in ("fig05_half_life", "mine"):
        plots.save(figure, name, tmp_path / "mini")
    plt.close(figure)
    said = [Image.open(tmp_path / "mini" / f"{name}.png").text["Source"] for name in ("fig05_half_life", "mine")]
    assert re.match(r"page \d\d_replacement; tables headline.csv, .*; profile mini; commit [0-9a-f]{40}", said[0])
    assert said[1].startswith("page none; tables none; profile mini; commit ")
    assert said[0].encode() in (tmp_path / "mini" / "fig05_half_life.pdf").read_bytes()


# The index of the figures


def saved():
    """notebook -> (names of the figures it saves, whether it sets the plot style)."""
    found = {}
    for path in (ROOT / "notebooks" / f"{name}.ipynb" for name in order.notebooks()):
        code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
        found[path.name] = re.findall(r'titles\.save\(figure, "(\w+)"', code), "plots.style()" in code
    return found


def test_every_figure_is_there_twice_and_has_the_style():
    for notebook, (names, styled) in saved().items():
        assert styled or not names, notebook
        for name in names:
            for kind in ("png", "pdf"):
                assert (ROOT / "figures" / "mini" / f"{name}.{kind}").is_file(), f"{name}.{kind}"


def test_every_link_of_the_index_leads_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", INDEX.read_text(encoding="utf-8"))
    assert len(links) > 60
    assert [link for link in links if not (INDEX.parent / link).exists()] == []


def test_the_index_has_every_file_and_every_figure_of_the_paper():
    text = INDEX.read_text(encoding="utf-8")
    for path in sorted((ROOT / "figures" / "mini").glob("*.p*")):
        assert f"(mini/{path.name})" in text, f"figures/README.md does not show {path.name}"
    names = {name for found, _ in saved().values() for name in found}
    assert {path.stem for path in (ROOT / "figures" / "mini").glob("*.png")} == names | SCREENSHOTS
    for number in range(1, 15):
        assert re.search(rf"^\*\*Fig\. (\d+ and )?{number}[a-d]?\b", text, re.M), f"Fig. {number} has no entry"


def test_the_index_names_the_page_that_draws_each_figure():
    text, pages = INDEX.read_text(encoding="utf-8"), saved()
    for entry in text.split("\n**")[1:]:
        shown = set(re.findall(r"!\[[^\]]*\]\(mini/(\w+)\.png\)", entry)) - SCREENSHOTS
        linked = re.findall(r"\]\(\.\./notebooks/(\w+\.ipynb)\)", entry)
        for name in shown:
            assert any(name in pages[page][0] for page in linked), f"{name} is drawn by none of {linked}"
