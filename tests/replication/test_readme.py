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
STATUSES = ("supported", "contradicted", "equivalent", "unsettled")
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
    table = pd.read_csv(results / "scorecard.csv")
    return table[table.group != "extension"]


def test_the_counts_of_the_scorecard(results, scorecard):
    counts = scorecard[scorecard.counts].groupby(["host", "status"]).size()
    rows = rows_of("| supported | contradicted | equivalent | unsettled |")
    verdicts = pd.read_csv(results / "repeats_verdicts.csv")
    kept = verdicts[~verdicts.turned].groupby(["host", "status"]).size()
    wanted = [
        [f"{counts.get((host, status), 0)} ({kept.get((host, status), 0)})" for status in STATUSES] for host in HOSTS
    ]
    assert [row[1:] for row in rows] == wanted
    asked, text = scorecard[scorecard.value.notna()].id.nunique(), " ".join(README.split())
    assert f"Of the {scorecard.id.nunique()} claims, {asked} are asked here" in text
    counted = scorecard[scorecard.counts]
    settled = counted[counted.status != "unsettled"]
    assert f"{len(settled)} of the {len(counted)} verdicts that count are settled" in text
    assert f"{(settled.holm <= 0.05).sum()} after Holm's adjustment within their host" in text
    assert f"{(counted.trainings == 1).sum()} rest on one training" in text


def test_what_the_repeats_say(results):
    names = ("repeats_verdicts", "repeats_held", "repeats-scorecard", "verdict_repeats")
    verdicts, held, repeats, agreement = (pd.read_csv(results / f"{name}.csv") for name in names)
    text = " ".join(README.split())
    assert f"**{verdicts.turned.sum()} of the {len(verdicts)} verdicts change at least once**" in text
    whole = held.set_index("host").loc["all"]
    interval = f"{whole.share:.0%} [{100 * whole.ci_low:.0f}, {100 * whole.ci_high:.0f}] of {whole.n:.0f} pairs"
    assert interval in text and f"right ones would in {whole.expected:.0%}" in text
    newlines = repeats[(repeats.id == "N2") & (repeats.host == "rwkv7") & (repeats.seed != 42)].value
    assert sorted(-newlines.round()) == [3, 16] and "but 16 and 3 with two other seeds" in text
    rows = agreement.set_index(["compared", "kind"])
    runs = rows.loc[("whole runs with other seeds", "observed")]
    five = rows.loc[("5 trainings and 5 others, the same places", "simulated")]
    elsewhere = rows.loc[("5 trainings and 5 others, other places", "simulated")]
    observed = f"{runs.differ:.1%} [{100 * runs.differ_low:.1f}, {100 * runs.differ_high:.1f}] of the verdicts differ"
    assert f"{observed}, where the stated probabilities expect {runs.stated:.1%}" in text
    assert (
        f"differ in {five.differ:.1%} of the verdicts at the same places and in {elsewhere.differ:.1%} at others"
        in text
    )


def test_the_headline_rows_of_the_scorecard(scorecard):
    table, rows = scorecard.set_index(["id", "host"]), rows_of("claim | | paper, its host |")
    assert len(rows) == 10
    for name, _, _, *cells in rows:
        for host, cell in zip(HOSTS, cells, strict=True):
            row = table.loc[(name, host)] if (name, host) in table.index else None
            if row is None or row.status not in STATUSES:
                assert not cell, f"{name} was not asked of {host}"
                continue
            value, low, high, status = ESTIMATE.fullmatch(cell).groups()
            assert shows(value, row.value) and shows(low, row.ci_low) and shows(high, row.ci_high), (name, host)
            assert row.status == status, (name, host)


CELLS = {"Gated DeltaNet, pooled": ("gated_deltanet", "pooled"), "Mamba-2, middle": ("mamba2", "middle")}
CELLS |= {name: ("gated_deltanet", name) for name in ("early", "middle", "late", "regime", "weighty")}
CELLS["RWKV-7, middle"] = ("rwkv7", "middle")


def row_with(table: pd.DataFrame, **values) -> pd.Series:
    """The only row with these values."""
    (row,) = (line for _, line in table[(table[list(values)] == pd.Series(values)).all(axis=1)].iterrows())
    return row


def test_the_headline_s_table(results):
    """Each estimate, n and number of seeds, compared with headline.csv."""
    headline = pd.read_csv(results / "headline.csv").query("draw == 'positions' and amplitude == 'coefficient'")
    rows = rows_of("beats deletion, % of places |")
    assert len(rows) == len(CELLS)
    for name, *shown, floor in rows:
        label, n, seeds = re.fullmatch(r"(.+) \(n = ([\d,]+), (\d) seeds?\)", name).groups()
        where = dict(zip(("host", "cells"), CELLS[label], strict=True))
        columns = [(target, centre) for centre in ("none", "mean") for target in ("state", "write")]
        for (target, centre), text in zip(columns, shown, strict=True):
            row = row_with(headline, **where, target=target, centre=centre, condition="atom")
            values = [100 * row[x] for x in ("win_rate", "win_rate_low", "win_rate_high")]
            assert all(shows(a, b) for a, b in zip(ESTIMATE.fullmatch(text).groups()[:3], values, strict=True)), text
            assert (row.n, row.seeds) == (int(n.replace(",", "")), int(seeds)), name
        random = row_with(headline, **where, target="write", centre="none", condition="random")
        assert shows(floor, 100 * random.win_rate), name
        ceiling = row_with(headline, **where, target="write", centre="none", condition="native_rescaled")
        assert ceiling.win_rate > 0.99, "the README says that the ceiling wins everywhere"


def test_the_first_finding_in_words(results):
    headline, apart = (pd.read_csv(results / f"{name}.csv") for name in ("headline", "headline_contrasts"))
    headline = headline.query("draw == 'positions' and amplitude == 'coefficient' and condition == 'atom'")
    text = " ".join(README.split())
    estimate = rf"({NUMBER})%? (?:points )?\[({NUMBER}), ({NUMBER})\]"
    sentence = re.search(
        rf"the write-trained atom beats deletion on {estimate} of 1,200 places and the state-trained one on {estimate} "
        rf"\(three seeds each; paired difference {estimate}\)",
        text,
    ).groups()
    rows = [
        row_with(headline, host="gated_deltanet", cells="pooled", centre="none", target=x) for x in ("write", "state")
    ]
    difference = row_with(apart, host="gated_deltanet", cells="pooled", centre="none", amplitude="coefficient")
    values = [100 * row[x] for row in rows for x in ("win_rate", "win_rate_low", "win_rate_high")]
    values += [100 * difference[x] for x in ("difference", "difference_low", "difference_high")]
    assert all(shows(a, b) for a, b in zip(sentence, values, strict=True))
    assert {row.n for row in rows} == {1200} and {row.seeds for row in rows} == {3}
    subtracted = row_with(apart, host="gated_deltanet", cells="pooled", centre="mean", amplitude="coefficient")
    found = re.search(rf"the difference between the targets is {estimate}", text).groups()
    values = [100 * subtracted[x] for x in ("difference", "difference_low", "difference_high")]
    assert all(shows(a, b) for a, b in zip(found, values, strict=True))


def test_the_paper_s_protocol_in_words(results):
    summary = pd.read_csv(results / "replacement_summary.csv")
    row = row_with(summary, host="gated_deltanet", cells="pooled", target="state", amplitude="coefficient")
    pattern = rf"\(states, mean, equal per atom\) gives ({NUMBER})% \[({NUMBER}), ({NUMBER})\] of ({NUMBER}) firings"
    *shown, n = re.search(pattern, " ".join(README.split())).groups()
    assert int(n.replace(",", "")) == row.n
    values = [100 * row[x] for x in ("win_rate", "boot_low", "boot_high")]
    assert all(shows(a, b) for a, b in zip(shown, values, strict=True))


def test_every_cell_in_words(results):
    apart, trend = (pd.read_csv(results / f"{name}.csv") for name in ("every_cell", "every_cell_trend"))
    rows = [row_with(apart, host=host, amplitude="coefficient") for host in HOSTS]
    text = " ".join(README.split())
    for target, words in dict(state="the state-trained atom beats deletion", write="the write-trained one").items():
        rates = re.search(rf"{words} on (\d+)%, (\d+)% and (\d+)%(?: of places)?", text).groups()
        assert all(shows(a, 100 * row[target]) for a, row in zip(rates, rows, strict=True)), target
    ahead = [f"{int(row.write_ahead)} of {int(row.n_cells)}" for row in rows]
    assert "ahead in {}, {} and {} cells".format(*ahead) in text
    shown = ESTIMATE.findall(re.search(r"on each architecture \(rho (.*?)\)\.", text)[1])
    assert len(shown) == 3
    for (value, low, high, _), host in zip(shown, HOSTS, strict=True):
        row = row_with(trend, host=host, target="state", amplitude="coefficient")
        ends = row.rho_half_life_median, row.rho_half_life_median_low, row.rho_half_life_median_high
        assert all(shows(a, b) for a, b in zip((value, low, high), ends, strict=True)), host


def test_the_causes(results):
    causes, rows = pd.read_csv(results / "causes.csv"), rows_of("| % of firings or places |")
    assert rows[0][1] == "92.4" and len(rows) == 1 + len(causes)
    for (name, text), row in zip(rows[1:], causes.itertuples(), strict=True):
        assert name == row.cause
        shown = ESTIMATE.fullmatch(text.replace(" points", "")).groups()[:3]
        assert all(shows(a, 100 * b) for a, b in zip(shown, (row.value, row.low, row.high), strict=True)), name
        assert ("points" in text) == (row.quantity == "difference")


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


def test_the_closed_form_through_the_layer(results):
    table = pd.read_csv(results / "logit_shift_summary.csv").set_index(["host", "predictor", "eps"]).r2_median
    text = " ".join(README.split())

    def numbers(predictor, eps, digits=3):
        return ", ".join(f"{table[host, predictor, eps]:.{digits}f}" for host in HOSTS)

    assert f"{numbers('through_layer', 1.0)} at one native norm and {numbers('through_layer', 3.0)} at three" in text
    assert f"(first order: {numbers('exact', 3.0, 2)})" in text
    assert f"final norm exactly too: {numbers('through_norm', 10.0)} at ten" in text


def test_the_attention_map(results):
    error = pd.read_csv(results / "attribution_summary.csv").error
    medians, fates = (pd.read_csv(results / f"attribution_{x}.csv").set_index("host") for x in ("trend", "fates"))
    text, main = " ".join(README.split()), "gated_deltanet"
    assert error.max() < 2e-6 and f"to 2e-6 of the largest read in all {len(error)} cells" in text
    wrong = f"wrong by {medians.decay_error[main]:.2f} of the size of the read on the Gated DeltaNet and by "
    assert wrong + f"{medians.decay_error['rwkv7']:.1f} on RWKV-7" in text
    assert f"erasures take {fates.all_erased[main]:.0%} of what the decay leaves of a write" in text
