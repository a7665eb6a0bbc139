"""The picture at the head of the README: a token writes, an atom takes the write's place, and the result.

The matrices are drawn from a seed and stand for nothing that was measured; the win rates are results."""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from replication import plots
from replication.findings import WIN, Results, win_rate

SIDE = 7
DECAY = 0.8


def matrices() -> dict[str, np.ndarray]:
    """Return a state, a write, an atom near the write, and the states after each."""
    draw = np.random.default_rng(5)
    before = sum(np.outer(draw.normal(size=SIDE), draw.normal(size=SIDE)) for _ in range(3)) / 2
    sides = np.array([[1.4, -1, 0.3, 1.7, -1.5, 0.4, 0.9], [-1.2, 0.6, 1.5, -0.4, 1.3, -1.6, 0.8]])
    write, atom = np.outer(*sides), np.outer(*(sides + 0.35 * draw.normal(size=sides.shape)))
    return dict(before=DECAY * before, write=write, atom=atom)


def _matrix(axes: plt.Axes, values: np.ndarray, title: str, colour: str = "black") -> None:
    axes.imshow(values, cmap="RdBu_r", vmin=-3, vmax=3)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=colour, pad=3)
    for side in axes.spines.values():
        side.set(visible=True, color=colour, linewidth=1.2 if colour != "black" else 0.6)


def _equation(figure: plt.Figure, row: int, name: str, title: str, colour: str, result: str) -> None:
    """Draw "decayed state + term = state", the term in a colour."""
    parts, bottom = matrices(), 0.56 - 0.5 * row
    shown = [(parts["before"], "decayed state", "black"), (parts[name], title, colour)]
    shown += [(parts["before"] + parts[name], result, "black")]
    for column, (values, label, shade) in enumerate(shown):
        _matrix(figure.add_axes((0.02 + 0.185 * column, bottom, 0.13, 0.29)), values, label, shade)
        if sign := ("+", "=", "")[column]:
            figure.text(0.178 + 0.185 * column, bottom + 0.14, sign, fontsize=12, ha="center", va="center")


def _rates(axes: plt.Axes, results: Results) -> None:
    """Draw how often each replacement beats deletion."""
    rows = {"write itself\n(ceiling)": (win_rate(results, "write", condition="native_rescaled"), "0.6")}
    rows["atom, SAE\nof writes"] = (win_rate(results, "write"), plots.TARGET["write"])
    rows["atom, SAE\nof states"] = (win_rate(results, "state"), plots.TARGET["state"])
    rows["random atom\n(floor)"] = (win_rate(results, "write", condition="random"), "0.6")
    for place, (row, colour) in enumerate(rows.values()):
        value, low, high = (100 * row[name] for name in WIN)
        axes.barh(place, value, color=colour, height=0.62)
        axes.errorbar(value, place, xerr=[[value - low], [max(high - value, 0)]], color="black", capsize=2, linewidth=1)
        axes.text(4, place, f"{value:.0f}%", fontsize=9, va="center", color="white", weight="bold")
    axes.axvline(50, color="black", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0, 103), xlabel="beats deletion (% of places)")
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.xaxis.label.set_size(8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


def draw(results: Results, folder: Path) -> None:
    """Write teaser.png into a folder."""
    plots.style()
    figure = plt.figure(figsize=(7, 2.9), layout="none")
    look = dict(fontsize=9, weight="bold")
    figure.text(0.02, 0.95, "a   A token writes a rank-1 matrix into the state", **look)
    figure.text(0.02, 0.45, "b   An atom of the dictionary takes its place", **look)
    figure.text(0.6, 0.95, "c   Is the model then nearer to", **look)
    figure.text(0.63, 0.89, "itself than with nothing there?", **look)
    _equation(figure, 0, "write", "write $k_t v_t^\\top$", "black", "next state")
    _equation(figure, 1, "atom", "atom $c\\,v_i w_i^\\top$", plots.TARGET["write"], "edited state")
    _rates(figure.add_axes((0.73, 0.17, 0.25, 0.68)), results)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "teaser.png", dpi=200, metadata={"Software": None})
    plt.close(figure)
