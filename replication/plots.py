"""The style of all figures, and the kinds of plots that several notebooks draw."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython import get_ipython
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

from replication.study.paths import ROOT, dry_run
from replication.study.stages import git_commit
from writesae.files import write_atomically

COLOURS = sns.color_palette("colorblind").as_hex()
HOST = dict(
    gated_deltanet="Gated DeltaNet", mamba2="Mamba-2", rwkv7="RWKV-7", delta_net="DeltaNet", gla="GLA", kda="KDA"
)
HOST |= {f"gated_deltanet_{seed}": f"Gated DeltaNet, seed {seed}" for seed in (1, 2)}
CONDITION = dict(atom=COLOURS[0], delete=COLOURS[7], random=COLOURS[3], reconstruction=COLOURS[2])
CONDITION |= dict(mean_write=COLOURS[1], resampled=COLOURS[4], native_rescaled=COLOURS[9])
TARGET = dict(state=COLOURS[3], write=COLOURS[0])
CENTRE_NAMES = dict(mean="mean subtracted", none="no mean", bias="learnt bias")
CONDITION_NAMES = dict(
    atom="atom",
    atom_and_mean="mean + atom",
    reconstruction="whole reconstruction",
    flat_svd="flat SAE, top pair",
    mean_write="mean write",
    resampled="another write",
    random="random atom (floor)",
    native_rescaled="native write, rescaled (ceiling)",
    delete="nothing",
)
PREDICTOR = dict(paper=COLOURS[3], paper_fitted=COLOURS[1], transport=COLOURS[9], exact=COLOURS[0])
PREDICTOR |= dict(through_layer=COLOURS[2], through_norm=COLOURS[4])
PREDICTOR_NAMES = dict(
    paper="the paper's formula",
    paper_fitted="the same, fitted",
    transport="exact state, direct path",
    exact="first order",
    through_layer="through the layer",
    through_norm="through layer and final norm",
)
DIRECTION = dict(paper=COLOURS[3], gamma=COLOURS[0], layerwise=COLOURS[2], refined=COLOURS[4], random=COLOURS[7])
HOST_COLOUR = dict(gated_deltanet=COLOURS[0], mamba2=COLOURS[1], rwkv7=COLOURS[2])
FAMILY = {"SAEs": COLOURS[0], "raw writes": COLOURS[1], "means of writes": COLOURS[2]}
FAMILY |= {"principal components": COLOURS[4], "floor and ceiling": COLOURS[7]}
DRY_RUN = "DRY RUN"
PAPER = dict(color="0.35", linestyle=":", linewidth=1.2)  # a line at a number of the paper
DASHES = dict(color="0.35", linestyle="none", marker="_", markersize=18)  # numbers to compare with
EVEN = dict(color="0.8", linewidth=0.8)  # the line of no effect
MARKERS = "osD^"
WIDEST = 7.0  # inches, a printed page
SMALLEST = 8.0  # points
LETTERS = 14  # of a title of 9 points in an inch
NAMES = HOST | dict(matched_norm="native norm", coefficient="own coefficient", mean_write="mean write")
NAMES |= dict(resampled="another write", native_rescaled="native write, rescaled", gamma="Γ", delete="deletion")


def style() -> None:
    """Set the style, and show figures in a notebook, whatever backend and matplotlibrc the user has."""
    if shell := get_ipython():
        shell.run_line_magic("matplotlib", "inline")
        shell.run_line_magic("config", "InlineBackend.figure_formats = ['png']")
    plt.rcdefaults()
    options = {"figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True, "pdf.fonttype": 42}
    options |= {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    sns.set_theme(context="paper", style="ticks", palette="colorblind", rc=options)


def scale(table: pd.DataFrame, name: str) -> str:
    """Return the axis scale of a column: "log" for half-lives unless all are infinite, else "linear"."""
    return "log" if name == "half_life_median" and np.isfinite(table[name]).any() else "linear"


def mark_dry_run(figure: plt.Figure) -> None:
    """Write DRY RUN across the figure, once."""
    if not any(text.get_gid() == DRY_RUN for text in figure.texts):
        options = dict(ha="center", va="center", rotation=25, weight="bold", color="0.2", alpha=0.25)
        size = 12 * min(figure.get_size_inches()[0], 2 * figure.get_size_inches()[1])
        figure.text(0.5, 0.5, DRY_RUN, fontsize=size, gid=DRY_RUN, in_layout=False, zorder=1000, **options)


@cache
def _makers() -> dict[str, tuple[str, list[str]]]:
    """Return for each figure the page that makes it and the page's tables, from the notebooks' metadata."""
    makers = {}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        files = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("writesae", {}).get("makes", [])
        tables = [Path(file).name for file in files if file.endswith(".csv")]
        makers |= {Path(file).stem: (path.stem, tables) for file in files if file.endswith(".png")}
    return makers


def origin(name: str, profile: str) -> str:
    """Return where a figure comes from, in a line for its metadata: page, tables, profile and commit."""
    page, tables = _makers().get(name, ("none", []))
    return f"page {page}; tables {', '.join(tables) or 'none'}; profile {profile}; commit {git_commit()}"


VARIANT_NAMES = CENTRE_NAMES | dict(rank1="rank 1", rank2="rank 2", tied="tied encoder")
VARIANT_NAMES |= dict(batch_topk="BatchTopK", jumprelu="JumpReLU")
CHOICE_NAMES = dict(target="SAE of", pooling="firings", reading="read by", kl_direction="KL", control="against")
LEVEL_NAMES = CENTRE_NAMES | dict(state="states", write="writes", rounds="equally per atom", random="a random atom")
LEVEL_NAMES |= dict(most_firing="of the most frequent", positions="by position", fresh="noise")
LEVEL_NAMES |= dict(native_patched="from the native run", patched_native="from the edited run")


def level_name(choice: str, level: str) -> str:
    """Return the name of a level of one of the choices of the multiverse, e.g. "SAE of writes"."""
    return f"{CHOICE_NAMES.get(choice, choice)} {LEVEL_NAMES.get(level, named(level))}"


def named(text: str) -> str:
    """Return a text of a figure with names for the keys of tables, e.g. "Mamba-2, middle" for "mamba2
    middle"; a text with names stays as it is, and so does "coefficient of" something."""
    keys = r"(?<![\w$])(?<!own )(" + "|".join(NAMES) + r")(?![\w$]| of)"
    return re.sub(keys, lambda match: NAMES[match[0]], text)


def variant_name(variant: str) -> str:
    """Return the name of a variant of an SAE, e.g. "bilinear, rank 1, JumpReLU" for
    "bilinear+rank1+jumprelu"."""
    return ", ".join(VARIANT_NAMES.get(part, part) for part in variant.split("+"))


def readable(figure: plt.Figure) -> None:
    """Make a figure fit for print: names for keys, no text below SMALLEST, no width above WIDEST, panel
    letters."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(min(width, WIDEST), height)
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            labels = [label.get_text() for label in axis.get_ticklabels()]
            if isinstance(axis.get_major_locator(), FixedLocator) and labels != [*map(named, labels)]:
                axis.set_ticks(axis.get_ticklocs(), [*map(named, labels)])
            size = axis.get_ticklabels()[0].get_fontsize() if axis.get_ticklabels() else SMALLEST
            axis.set_tick_params(labelsize=max(size, SMALLEST))
    for text in figure.findobj(Text):
        text.set_text(named(text.get_text()))
        text.set_fontsize(max(text.get_fontsize(), SMALLEST))
    panels = [axes for axes in figure.axes if axes.get_label() != "<colorbar>" and axes.axison]
    for letter, axes in zip(ascii_lowercase, panels if len(panels) > 1 else []):
        place = dict(xycoords="axes fraction", textcoords="offset points", ha="right", va="bottom", gid="letter")
        if not any(text.get_gid() == "letter" for text in axes.texts):
            axes.annotate(letter, (0, 1), (-4, 4), weight="bold", fontsize=9, annotation_clip=False, **place)


def wrapped(title: str, width: float) -> list[str]:
    """Return the lines of a title over a figure of `width` inches: as few as possible, of about equal length."""
    most = int(LETTERS * width)
    count = len(wrap(title, most))
    return next(lines for letters in range(1, most + 1) if len(lines := wrap(title, letters)) == count)


def entitle(figure: plt.Figure, title: str) -> None:
    """Put a title above all panels, on the left, and make the figure higher by its lines; only once."""
    if not figure.get_suptitle():
        width, height = figure.get_size_inches()
        lines = wrapped(title, width)
        figure.set_size_inches(width, height + 0.08 + 0.15 * len(lines))
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9)


def save(figure: plt.Figure, name: str, folder: Path, title: str = "") -> None:
    """Write NAME.pdf and NAME.png, `readable`, the same for the same figure; those of a dry run are marked.

    Their metadata (Subject, Source) say where they come from. folder: its name is the profile's. title: the
    finding, above the panels; notebooks save with `titles.save`, which computes it."""
    readable(figure)
    if title:
        entitle(figure, title)
    if dry_run():
        mark_dry_run(figure)
    source = origin(name, Path(folder).name)
    undated = {"CreationDate": None, "ModDate": None, "Subject": source}
    for kind, metadata in (("pdf", undated), ("png", {"Software": None, "Source": source})):
        draw = partial(figure.savefig, format=kind, metadata=metadata)
        write_atomically(Path(folder) / f"{name}.{kind}", draw)


def dodge(count: int, width: float = 0.24) -> np.ndarray:
    """Return shifts [count] that put points side by side, `width` from the first to the last."""
    return np.linspace(-width / 2, width / 2, count) if count > 1 else np.zeros(count)


def with_interval(axes: plt.Axes, x, value, low, high, horizontal: bool = False, **options) -> None:
    """Draw points with their intervals as error bars; `horizontal` draws the values along the x axis.

    A bootstrap interval can exclude its point: the bar then ends at the point."""
    reach = np.clip([value - low, high - value], 0, None)
    places = dict(x=value, y=x, xerr=reach) if horizontal else dict(x=x, y=value, yerr=reach)
    axes.errorbar(**places, **dict(linestyle="none", marker="o", capsize=2, markersize=4) | options)


def panel(
    axes: plt.Axes,
    table: pd.DataFrame,
    x: str,
    by: str | list[str],
    interval: Sequence[str],
    colours: Mapping[str, str],
    order: Sequence | None = None,
    label: str | None = None,
    width: float = 0.24,
    step: float = 0.0,
    horizontal: bool = False,
    **options,
) -> None:
    """Draw points with intervals at the categories of column `x`, the groups side by side.

    by: columns that define the groups; the first sets the colour, a second one the marker. interval: columns
    value, low and high. order: categories to draw (default: all). label: format of a group's names. width:
    from first to last group (a category has width 1). step: between points of one group and category."""
    by = list(by) if isinstance(by, (list, tuple)) else [by]
    order = list(dict.fromkeys(table[x]) if order is None else order)
    markers = dict(zip(dict.fromkeys(table[by[1]]), MARKERS)) if len(by) > 1 else {}
    groups = list(table[table[x].isin(order)].groupby(by))
    for shift, (names, rows) in zip(dodge(len(groups), width), groups, strict=True):
        same = rows.groupby(x)
        within = step * (same.cumcount() - (same[interval[0]].transform("size") - 1) / 2)
        places = [order.index(level) for level in rows[x]] + within + shift
        look = dict(color=colours[names[0]], marker=markers.get(names[-1], "o"))
        look["label"] = label.format(*names) if label else ", ".join(names)
        with_interval(axes, places, *(rows[column] for column in interval), horizontal, **look | options)
    categories, limits = (axes.set_yticks, axes.set_ylim) if horizontal else (axes.set_xticks, axes.set_xlim)
    categories(range(len(order)), order)
    limits(-0.5, len(order) - 0.5)


def boxes(axes: plt.Axes, values: Sequence, colours: Sequence[str], **options) -> None:
    """Draw one box per group: median, quartiles, whiskers to the last value within 1.5 box lengths."""
    look = dict(showfliers=False, patch_artist=True, medianprops=dict(color="black"))
    drawn = axes.boxplot(values, **look, **options)
    for box, colour in zip(drawn["boxes"], colours, strict=True):
        box.set(facecolor=colour, alpha=0.6)


def r2_curves(axes: plt.Axes, summary: pd.DataFrame, value: str, low: str, high: str, floor=-1.0) -> None:
    """Draw R2 of each predictor, with its band, against the size of the edit, eps.

    Values below `floor` are drawn there; small shifts along the axis separate equal values."""
    groups = list(summary.groupby("predictor", sort=False))
    for shift, (name, part) in zip(dodge(len(groups), 0.12), groups, strict=True):
        eps, colour = part.eps * 10**shift, PREDICTOR[name]
        middle, bottom, top = (part[column].clip(lower=floor) for column in (value, low, high))
        axes.plot(eps, middle, "o-", markersize=4, linewidth=1, color=colour, label=PREDICTOR_NAMES[name])
        axes.fill_between(eps, bottom, top, alpha=0.15, color=colour)
    axes.set(xscale="log", xlabel="size of the edit (native write norms)")
    axes.set_xticks(sizes := sorted(summary.eps.unique()), [f"{size:g}" for size in sizes])
    axes.minorticks_off()


def family_lines(axes: plt.Axes, table: pd.DataFrame, x: str, **measures: str) -> None:
    """Draw shares with their intervals against a size on a log axis: a colour per family, a marker per
    measure.

    measures: column=label, in the legend if there are several. Points are shifted so that they do not hide
    one another."""
    shifts = iter(dodge(len(measures) * table.family.nunique(), 0.2))
    for marker, (name, label) in zip(MARKERS, measures.items()):
        for family, part in table.sort_values(x).groupby("family", sort=False):
            look = dict(marker=marker, linestyle="-" if marker == MARKERS[0] else ":", linewidth=1)
            bars = (part[name + end] for end in ("", "_low", "_high"))
            with_interval(axes, part[x] * 2 ** next(shifts), *bars, color=HOST_COLOUR[family], **look)
        if len(measures) > 1:
            axes.plot([], [], marker=marker, color="0.4", markersize=4, linewidth=1, label=label)
    axes.set(xscale="log", ylim=(-0.04, 1.04))
    axes.set_xticks(sizes := sorted(table[x].unique()), [f"{size:g}" for size in sizes])
    axes.minorticks_off()
    if len(measures) > 1:
        axes.legend(fontsize=8)


def family_legend(figure: plt.Figure, families: Sequence[str]) -> None:
    """Put the families' colours below the panels of `family_lines`."""
    lines = [plt.Line2D([], [], color=HOST_COLOUR[family], marker="o", markersize=4) for family in families]
    names = [HOST[family] for family in families]
    figure.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=8)


def densities(axes: plt.Axes, table: pd.DataFrame, value: str, by: str, colours: Mapping[str, str]) -> None:
    """Draw the kernel density of a column, one curve per level of `by`."""
    for name, rows in table.groupby(by, sort=False):
        look = dict(color=colours[name], label=f"{name}, n = {len(rows):,}")
        sns.kdeplot(x=rows[value], ax=axes, bw_adjust=0.5, **look)


def levels(axes: plt.Axes, table: pd.DataFrame, choices: Mapping[str, Sequence[str]]) -> None:
    """Draw the lower half of a specification curve: for each level of each choice, a row of marks at the
    indices of the table's rows with that level. Choices with a single level are not drawn."""
    shown = [(c, x) for c, of_choice in choices.items() for x in of_choice if 0 < (table[c] == x).mean() < 1]
    for row, (choice, level) in enumerate(shown):
        places = table.index[table[choice] == level]
        colour = COLOURS[list(choices).index(choice)]
        axes.plot(places, np.full(len(places), row), "|", markersize=5, markeredgewidth=0.4, color=colour)
    axes.set_yticks(range(len(shown)), [level_name(c, x) for c, x in shown], fontsize=8)
    axes.invert_yaxis()
