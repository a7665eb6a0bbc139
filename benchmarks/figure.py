"""Draw cost against state size from results/bench/training_step.csv: `python benchmarks/figure.py`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from common import start

from replication import plots
from replication.study import paths as paths_module
from replication.study import stages

METHODS = dict(
    plain=("states, the paper's recipe", plots.COLOURS[3], "s"),
    dense=("states, active atoms only", plots.COLOURS[1], "^"),
    factored=("factored, no states", plots.COLOURS[0], "o"),
)
GIB = (0.5, 1, 2, 4)


def draw(table: pd.DataFrame) -> plt.Figure:
    """Draw time per token (median and range of the rounds) and peak memory against the side of the state."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 2.7))
    sides = sorted(table.side.unique())
    for method, (label, colour, marker) in METHODS.items():
        rows = table[table.method == method].sort_values("side")
        seconds = rows[["seconds", "fastest", "slowest"]]
        per_token = 1e3 * seconds / rows[["windows"]].to_numpy() / rows[["tokens"]].to_numpy()
        low, middle, high = per_token.fastest, per_token.seconds, per_token.slowest
        style = dict(color=colour, marker=marker, markersize=4, label=label)
        left.errorbar(rows.side, middle, yerr=[middle - low, high - middle], capsize=2, **style)
        right.plot(rows.side, rows.peak_mib / 1024, **style)
    left.set(ylabel="milliseconds per token")
    right.set(ylabel="peak memory, GiB")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log", xlabel="side d of the state (d x d)")
        axes.set_xticks(sides, [f"{side:g}" for side in sides])
        axes.minorticks_off()
    right.set_yticks(GIB, [f"{size:g}" for size in GIB])
    left.legend(fontsize=7)
    return figure


def main() -> None:
    quick, paths = start().quick, paths_module.Paths("bench")
    table = stages.read_table((paths.build if quick else paths.results) / "training_step.csv")
    plots.style()
    plots.save(draw(table.dropna(subset="side")), "cost_against_state_size", paths.build if quick else paths.figures)


if __name__ == "__main__":
    main()
