"""The titles of the figures: each has one, each follows its tables, and its tables are there before it."""

import re
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from PIL import Image

from replication import plots, titles
from replication.commands import order
from replication.findings import Results
from replication.study.paths import ROOT

MINI, FIGURES = ROOT / "results" / "mini", ROOT / "figures" / "mini"
SAVE = re.compile(r'titles\.save\(figure, "(\w+)", study\)')


def cells(page):
    """The sources of a page's code cells."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{page}.ipynb", as_version=4)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


NOTEBOOKS = order.notebooks()
PAGES = {page: cells(page) for page in NOTEBOOKS}
DRAWN = {name: page for page, sources in PAGES.items() for name in SAVE.findall("\n".join(sources))}


def study(results, name="mini"):
    folder = results.parent / "figures"
    return SimpleNamespace(profile=SimpleNamespace(name=name), paths=SimpleNamespace(results=results, figures=folder))


def test_every_figure_of_a_page_has_a_title_and_every_title_a_figure():
    assert set(DRAWN) == set(titles.TITLES) and len(DRAWN) > 50
    assert not any("plots.save(" in source for sources in PAGES.values() for source in sources)


@pytest.mark.parametrize("name", titles.TITLES)
def test_a_title_takes_at_most_two_lines(name):
    title = titles.TITLES[name](Results(MINI))
    width = Image.open(FIGURES / f"{name}.png").width / 200  # dots per inch
    assert len(plots.wrapped(title, width)) <= 2
    assert len(title) > 40 and not re.search(r"nan|inf\b|True|False|_|  |\.$|-0%", title)
    assert all(float(share) <= 100 for share in re.findall(r"([\d.]+)%", title))


def made_before(page):
    """The tables that other pages have made before `page`."""
    needs = NOTEBOOKS[page].needs
    return {made for other in needs for made in (*NOTEBOOKS[other].makes, *made_before(other))}


@pytest.mark.parametrize("name", titles.TITLES)
def test_a_title_reads_tables_that_are_there_before_its_figure(name):
    """What a cell writes itself must be above the figure. What functions write cannot be seen here."""
    results, page, tables = Results(MINI), DRAWN[name], set()
    read, results._read = results._read, lambda path: tables.add(path.stem) or read(path)
    titles.TITLES[name](results)
    code = "\n".join(PAGES[page])
    above = code[: code.index(f'titles.save(figure, "{name}"')]
    for table in tables:
        file, write = f"results/{{profile}}/{table}.csv", f'study.write("{table}"'
        in_function = file in NOTEBOOKS[page].makes and write not in code
        there = file in made_before(page) or write in above or in_function
        assert there, f"{name} reads {table}.csv, which {page} has not made yet"


CHANGES = [  # figure, table, rows, new values, words
    ("fig00_hosts", "hosts", dict(host="rwkv7"), dict(training_tokens=9_500_000), " 9.5 million tokens"),
    ("fig03_classes", "atom_mixtures", dict(target="state"), dict(ci_low=1, ci_high=2), "surely not for state"),
    ("fig04_predicted_kl", "predicted_kl_summary", dict(way="cosine"), dict(rho_high=1.0), "not surely better"),
    ("fig04_r2", "logit_shift_summary", dict(predictor="exact"), dict(r2_median=0.8), "at no size to first order"),
    (
        "fig05_win_rates",
        "headline",
        dict(target="write", condition="atom"),
        dict(win_rate=0.1234),
        "at 12% and 47% of places",
    ),
    (
        "fig05_half_life",
        "replacement_trend",
        dict(target="state"),
        dict(rho_half_life_median_low=0.5, rho_half_life_median_high=0.7),
        "rises for state-trained",
    ),
    ("fig07_objects", "objects_summary", dict(object="state"), dict(rho_low=0.2), "rises if the state"),
    ("fig12_delay", "install_memory_summary", dict(host="mamba2"), dict(rho_low=-0.1), "does not surely change"),
    ("fig12_cells", "install_cells_summary", dict(cells="one"), dict(next_token=0.31), "31% in one cell"),
    ("fig20_scorecard", "scorecard", dict(status="unsettled"), dict(status="equivalent"), "100% of"),
]


@pytest.mark.parametrize(("name", "table", "rows", "values", "words"), CHANGES)
def test_a_title_turns_with_its_tables(name, table, rows, values, words, tmp_path):
    assert words not in titles.TITLES[name](Results(MINI))
    frame = pd.read_csv(MINI / f"{table}.csv")
    chosen = (frame[list(rows)] == pd.Series(rows)).all(axis=1)
    assert chosen.any()
    frame.loc[chosen, list(values)] = list(values.values())
    frame.to_csv(tmp_path / f"{table}.csv")
    assert words in titles.TITLES[name](Results(tmp_path))


def test_lines_are_few_and_about_equally_long():
    assert plots.wrapped("aaa bbb ccc ddd", 1.0) == ["aaa bbb", "ccc ddd"]  # 14 letters fit
    assert plots.wrapped("aaa bbb ccc dd", 1.0) == ["aaa bbb ccc dd"]


@pytest.fixture
def figure():
    made, _ = plt.subplots(figsize=(6, 3), layout="constrained")
    yield made
    plt.close(made)


@pytest.mark.parametrize("profile", ["mini", "mini-1001"])
def test_a_figure_of_mini_has_its_finding_as_the_title(figure, profile, tmp_path):
    figure.canvas.draw()
    before = figure.axes[0].get_window_extent().height
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "harvest.csv").write_text("host,median_write_norm\na,0.5\nb,21\n")
    for _ in range(2):
        titles.save(figure, "fig01_writes", study(tmp_path / "results", profile))
    assert figure.get_suptitle() == "The median norm of a native write lies between 0.50 and 21.0 in 2 cells"
    assert (tmp_path / "figures" / "fig01_writes.png").is_file()
    assert figure.axes[0].get_window_extent().height >= before - 1
    assert 3.1 < figure.get_size_inches()[1] < 3.4


def test_other_profiles_dry_runs_and_tables_without_the_rows_have_no_title(figure, tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "harvest.csv").write_text("host,median_write_norm\na,0.5\n")
    (tmp_path / "results" / "headline.csv").write_text("host,cells\nmamba2,pooled\n")
    here = tmp_path / "results"
    assert titles.title("fig01_writes", study(here)) and not titles.title("fig01_writes", study(here, "smoke"))
    assert not titles.title("fig05_win_rates", study(here)) and not titles.title("mine", study(here))
    monkeypatch.setenv("WRITESAE_DRY_RUN", "1")
    titles.save(figure, "fig01_writes", study(here))
    assert figure.get_suptitle() == ""


def test_a_table_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"harvest\.csv"):
        titles.title("fig01_writes", study(tmp_path))
