"""One look for all figures: colour-blind safe, vector PDF and PNG, written whole, provenance in the file name's folder."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns

from writesae.artifacts import dry_run, write_atomically

COLOURS = sns.color_palette("colorblind").as_hex()
CONDITION = dict(
    atom=COLOURS[0],
    delete=COLOURS[7],
    random=COLOURS[3],
    reconstruction=COLOURS[2],
    mean_write=COLOURS[1],
    resampled=COLOURS[4],
    native_rescaled=COLOURS[9],
)
TARGET = dict(state=COLOURS[3], write=COLOURS[0])
PREDICTOR = dict(paper=COLOURS[3], paper_fitted=COLOURS[1], transport=COLOURS[9], exact=COLOURS[0])
DIRECTION = dict(paper=COLOURS[3], gamma=COLOURS[0])
DRY_RUN = "DRY RUN"
PAPER = dict(color="0.35", linestyle=":", linewidth=1.2)  # every line that shows a number of the paper


def style() -> None:
    """Set the style; the first line of every notebook's plotting."""
    sns.set_theme(context="paper", style="ticks", palette="colorblind")
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "pdf.fonttype": 42,
            "svg.hashsalt": "writesae",
        }
    )


def mark_dry_run(figure: plt.Figure) -> None:
    """DRY RUN across the figure, once."""
    if not any(text.get_gid() == DRY_RUN for text in figure.texts):
        options = dict(ha="center", va="center", rotation=25, color="0.2", alpha=0.25, weight="bold", zorder=1000)
        size = 12 * min(figure.get_size_inches()[0], 2 * figure.get_size_inches()[1])
        figure.text(0.5, 0.5, DRY_RUN, fontsize=size, gid=DRY_RUN, in_layout=False, **options)


def save(figure: plt.Figure, name: str, folder: Path) -> None:
    """figures/<profile>/NAME.pdf and .png; each appears whole or not at all, and the same figure gives the same file.
    A dry run's figures are marked as such."""
    if dry_run():
        mark_dry_run(figure)
    for kind, metadata in (("pdf", {"CreationDate": None, "ModDate": None}), ("png", {"Software": None})):
        write_atomically(
            Path(folder) / f"{name}.{kind}",
            lambda path, kind=kind, metadata=metadata: figure.savefig(path, format=kind, metadata=metadata),
        )


def with_interval(axes: plt.Axes, x, value, low, high, **options) -> None:
    """Points with their intervals as error bars."""
    axes.errorbar(x, value, yerr=[value - low, high - value], fmt="o", capsize=2, markersize=4, **options)
