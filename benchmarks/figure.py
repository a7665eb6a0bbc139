"""Draw cost against the side of the state, from results/bench: `python benchmarks/figure.py`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from common import start
from matplotlib.axes import Axes

from replication import plots
from replication.study import paths as paths_module
from replication.study import stages

STYLES = dict(
    plain=dict(color=plots.COLOURS[3], marker="s"),
    dense=dict(color=plots.COLOURS[1], marker="^"),
    factored=dict(color=plots.COLOURS[0], marker="o"),
)
NAMES = {  # part: what each method does
    "training step": dict(plain="the paper's recipe", dense="active atoms only", factored="without states"),
    "harvest": dict(plain="states, from a cache", factored="factors of the writes"),
    "replacement": dict(plain="firing by firing", factored="all in a batch"),
    "closed form": dict(plain="one forward per atom", factored="one backward for all"),
}
GIB = (0.5, 0.7, 1, 2, 4)


def draw_time(axes: Axes, rows: pd.DataFrame, names: dict[str, str], unit: str) -> None:
    """Draw milliseconds per unit (median and range of the rounds), one line per method."""
    for method, name in names.items():
        one = rows[rows.method == method].sort_values("side")
        units = one.rate * one.seconds
        low, middle, high = (1e3 * one[column] / units for column in ("fastest", "seconds", "slowest"))
        spread = [middle - low, high - middle]
        axes.errorbar(one.side, middle, yerr=spread, capsize=2, markersize=4, label=name, **STYLES[method])
    axes.set(ylabel=f"milliseconds per {unit}")


def draw_memory(axes: Axes, rows: pd.DataFrame, names: dict[str, str]) -> None:
    """Draw the peak memory of the process in GiB, one line per method."""
    for method, name in names.items():
        one = rows[rows.method == method].sort_values("side")
        axes.plot(one.side, one.peak_mib / 1024, markersize=4, label=name, **STYLES[method])
    axes.set(ylabel="peak memory, GiB")
    ticks = [size for size in GIB if 1024 * size <= rows.peak_mib.max()]
    axes.set_yticks(ticks, [f"{size:g}" for size in ticks])


def draw(training: pd.DataFrame, growth: pd.DataFrame) -> plt.Figure:
    """Draw the time of all parts and the memory of two, from training_step.csv and growth.csv."""
    figure, grid = plt.subplots(2, 3, figsize=(7, 5.2))
    tables = {"training step": training} | dict(iter(growth.groupby("part")))
    panels = iter(grid.flat)
    for part, names in NAMES.items():
        whats = ("time", "memory") if part in ("training step", "harvest") else ("time",)
        for what in whats:
            axes, rows = next(panels), tables[part]
            axes.set(xscale="log", yscale="log", title=part, xlabel="side d of the state (d x d)")
            if what == "time":
                draw_time(axes, rows, names, rows.unit.iloc[0])
            else:
                draw_memory(axes, rows, names)
            if what == whats[-1]:
                low, high = axes.get_ylim()
                axes.set_ylim(low, high * (high / low) ** (0.16 * len(names)))  # room for the legend
                axes.legend(fontsize=8, loc="upper left", borderaxespad=0.1, handlelength=1.5)
            sides = sorted(rows.side.unique())
            axes.set_xticks(sides, [f"{side:g}" for side in sides])
            axes.minorticks_off()
    return figure


def main() -> None:
    quick, paths = start().quick, paths_module.Paths("bench")
    folder = paths.build if quick else paths.results
    training, growth = (stages.read_table(folder / f"{name}.csv") for name in ("training_step", "growth"))
    plots.style()
    figure = draw(training.dropna(subset="method"), growth)
    plots.save(figure, "cost_against_state_size", paths.build if quick else paths.figures)


if __name__ == "__main__":
    main()
