"""The numbers in the README, compared with the committed results at the digits shown.

An edited README is compared with the results of the working copy, any other with those of the last commit,
because `make all` on another machine changes the results of the working copy.
"""

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOSTS = ("gated_deltanet", "mamba2", "rwkv7")
STATUSES = ("same direction", "opposite", "no effect")
NUMBER = r"[+-]?\d[\d,]*(?:\.\d+)?"
ESTIMATE = re.compile(rf"({NUMBER}) \[({NUMBER}), ({NUMBER})\] ?([a-z ]*)")


def rows_of(header: str) -> list[list[str]]:
    """The cells of each row of the table that starts with `header`."""
    after = README.split(f"\n| {header}", 1)[1].split("\n")[2:]  # after the header and the line of dashes
    lines = after[: after.index("")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def shows(text: str, value: float) -> bool:
    """Whether `text` equals `value`, rounded to the digits of `text`."""
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5000001 * 10**-digits


@pytest.fixture(scope="module")
def tables(last_commit):
    """NAME -> results/NAME, of the working copy if the README is edited, else of the last commit."""
    edited = subprocess.run(["git", "-C", ROOT, "diff", "--quiet", "HEAD", "--", "README.md"], capture_output=True)
    return (lambda name: ROOT / "results" / name) if edited.returncode == 1 else last_commit


@pytest.fixture(scope="module")
def results(tables):
    return tables("mini")


@pytest.fixture(scope="module")
def bench(tables):
    return tables("bench")


@pytest.fixture(scope="module")
def scorecard(results):
    return pd.read_csv(results / "scorecard.csv")


def test_the_counts_of_the_scorecard(results, scorecard):
    counts = scorecard.groupby(["host", "status"]).size()
    rows = rows_of("| same direction | opposite | no effect |")
    verdicts = pd.read_csv(results / "repeats_verdicts.csv")
    kept = verdicts[~verdicts.turned].groupby(["host", "status"]).size()
    wanted = [[f"{counts[host, status]} ({kept[host, status]})" for status in STATUSES] for host in HOSTS]
    assert [row[1:] for row in rows] == wanted
    asked = scorecard[scorecard.status.isin(STATUSES)].id.nunique()
    assert f"Of the {scorecard.id.nunique()} claims, {asked} are asked here" in README


def test_what_the_repeats_say(results):
    names = ("repeats_verdicts", "repeats_held", "repeats-scorecard")
    verdicts, held, repeats = (pd.read_csv(results / f"{name}.csv") for name in names)
    always, text = verdicts[~verdicts.turned].status.value_counts(), " ".join(README.split())
    assert f"**{verdicts.turned.sum()} of the {len(verdicts)} verdicts turn at least once**" in text
    kept = f"{always['same direction']} go in the paper's direction in every run and {always['opposite']} in the opposite one"
    assert kept in text
    share = held.set_index("host").share.map("{:.0%}".format)
    whole = held.set_index("host").loc["all"]
    interval = f"{share['all']} [{100 * whole.ci_low:.0f}, {100 * whole.ci_high:.0f}] of {whole.n:.0f} pairs"
    assert interval in text and f"right ones would in {whole.expected:.0%}" in text
    assert "({}, {} and {} on the three hosts)".format(*share[list(HOSTS)]) in text
    newlines = repeats[(repeats.id == "N2") & (repeats.host == "rwkv7") & (repeats.seed != 42)].value
    assert sorted(-newlines.round()) == [3, 16] and "but 16 and 3 with two other seeds" in text


def test_the_replacement_test_in_the_repeats(results):
    rates = pd.read_csv(results / "repeats_rates.csv")
    rates = rates.query("write == 'added' and read == 'write' and kl_direction == 'native_patched'")
    assert set(rates.runs) == {4}
    rates = (100 * rates.set_index(["host", "cells", "target", "amplitude"])[["least", "most"]]).map("{:.1f}%".format)
    text, table = (
        " ".join(README.split()),
        {row[0]: row[1:] for row in rows_of("| Gated DeltaNet | Mamba-2 | RWKV-7 |")},
    )
    rows = {"": ("write", "coefficient"), " at the native write's norm": ("write", "matched_norm")}
    rows = {f"in four runs, write-trained{name}": choice for name, choice in rows.items()}
    for name, choice in (rows | {"in four runs, state-trained": ("state", "coefficient")}).items():
        assert table[name] == ["{} to {}".format(*rates.loc[(host, "middle", *choice)]) for host in HOSTS], name
    state, write, norm = (
        rates.loc[("gated_deltanet", "pooled", *choice)]
        for choice in (("state", "coefficient"), ("write", "coefficient"), ("write", "matched_norm"))
    )
    assert "between {} and {} and between {} and {}".format(*state, *write) in text
    assert "on {} to {} in the four runs".format(*norm) in text


def test_the_headline_rows_of_the_scorecard(scorecard):
    table, rows = scorecard.set_index(["id", "host"]), rows_of("claim | | paper, its host |")
    assert len(rows) == 10
    for name, _, _, *cells in rows:
        for host, cell in zip(HOSTS, cells, strict=True):
            row = table.loc[(name, host)]
            if row.status not in STATUSES:
                assert not cell, f"{name} was not run on {host}"
                continue
            value, low, high, status = ESTIMATE.fullmatch(cell).groups()
            assert shows(value, row.value) and shows(low, row.ci_low) and shows(high, row.ci_high), (name, host)
            assert row.status.startswith(status), (name, host)


def test_the_headline_in_words(results):
    """Compares the sentence with the summary table, with the intervals of the bootstrap by atom."""
    summary = pd.read_csv(results / "replacement_summary.csv")
    pooled = summary.query("host == 'gated_deltanet' and cells == 'pooled' and amplitude == 'coefficient'")
    pooled = pooled.set_index("target")
    text = " ".join(README.split())
    sentence = re.search(
        rf"Trained on states.*? beats deletion on ({NUMBER})% \[({NUMBER}), ({NUMBER})\] of ({NUMBER}) firings; "
        rf"trained on writes, on ({NUMBER})% \[({NUMBER}), ({NUMBER})\]",
        text,
    )
    *state, n, win, low, high = sentence.groups()
    assert int(n.replace(",", "")) == pooled.n["state"] == pooled.n["write"]
    for target, shown in (("state", state), ("write", [win, low, high])):
        values = pooled.loc[target, ["win_rate", "boot_low", "boot_high"]]
        assert all(shows(a, 100 * b) for a, b in zip(shown, values, strict=True)), target


def test_what_it_costs(bench):
    steps = pd.read_csv(bench / "training_step.csv").set_index("case")
    replacement = pd.read_csv(bench / "replacement.csv").query("case == 'plain'").set_index(["depth", "conditions"])
    closed = pd.read_csv(bench / "closed_form.csv").set_index("case")
    harvest = pd.read_csv(bench / "harvest_speed.csv").query("case == 'forward'").set_index("host")
    cells = [ESTIMATE.findall(row[-1]) or row[-1].split("; ") for row in rows_of("| against | times as fast |")]
    rows = [
        [steps.loc["plain 64"]],
        [steps.loc["plain 128"], steps.loc["plain 256"]],
        [steps.loc["whole 128"]],
        [harvest.loc[host] for host in HOSTS],
        [replacement.loc[("early", 3)], replacement.loc[("late", 3)]],
        [replacement.loc[("late", 16)]],
        [closed.loc["one by one"], closed.loc["batched"]],
    ]
    for shown, measured in zip(cells, rows, strict=True):
        for text, row in zip(shown, measured, strict=True):
            parts = [text] if isinstance(text, str) else text[:3]
            values = [row.ratio, row.low, row.high][: len(parts)]
            assert all(shows(a, b) for a, b in zip(parts, values, strict=True)), (text, values)
