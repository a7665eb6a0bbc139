"""Write the numbers of the README and of docs/ from the results, and draw the README's teaser.

A number or a table lies between `<!--=NAME-->` and `<!--/-->`, which Markdown does not show. NAME is a
function of this module with the decorator `block`, and what it returns replaces what lies between."""

from __future__ import annotations

import argparse
import re
import tomllib
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd

from replication import answers, findings
from replication.commands import order
from replication.commands.crate import write_crate
from replication.findings import HOSTS, MAIN, WIN, Results, estimate, listed, percent, r2, win_rate
from replication.plots import HOST
from replication.scorecard.claims import papers_value
from replication.scorecard.criteria import read_criteria
from replication.scorecard.verdicts import VERDICTS
from replication.study.paths import ROOT

MARKED = re.compile(r"(<!--=(\w+)-->)(.*?)(<!--/-->)", re.DOTALL)
BLOCKS: dict[str, Callable[[Results, Results], str]] = {}  # name: function of the results and the benchmarks


def block(function: Callable) -> Callable:
    BLOCKS[function.__name__] = function
    return function


def table(header: str, rows: list[list[str]]) -> str:
    """Return a Markdown table, between empty lines. header: "a | b"."""
    dashes = " | ".join("---" for _ in header.split("|"))
    lines = [f"| {line} |" for line in (header, dashes, *(" | ".join(row) for row in rows))]
    return "\n\n" + "\n".join(lines) + "\n\n"


def page(name: str) -> str:
    return f"[{name[:2]}](notebooks/{name}.ipynb)"


def page_title(name: str) -> str:
    """Return "05 · Can an atom stand for a write?", the first heading of a notebook."""
    first = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells[0].source
    return first.splitlines()[0].removeprefix("# ")


# The README


@block
def glance(results, bench) -> str:
    """Question, the paper's number, ours, verdict and page."""
    centred, state = (percent(win_rate(results, "state", centre), *WIN) for centre in ("mean", "none"))
    rhos = [
        estimate(findings.with_memory(results, amplitude=amplitude), "rho_half_life_median", digits=2, scale=1)
        for amplitude in ("coefficient", "projection")
    ]
    memory = "where half-life is long: rank correlation {}; scaled to fit {}".format(*rhos)
    small = results.row("atom_match_shares", host=MAIN, target="state", **{"class": "all"})
    again = percent(small, "share", "ci_low", "ci_high", digits=1)
    of_hosts = listed(findings.atoms_again(results, host) for host in HOSTS)
    again = f"small SAEs: {again}; main SAEs: {of_hosts}"
    closed = listed(f"{r2(results, 'through_layer', 1.0, host):.3f}" for host in HOSTS)
    said = results.row("install_summary", host=MAIN, direction="paper", target_class="all", magnitude=3.0)
    fitted = results.row("scorecard", id="C1", host=MAIN).value
    rows = findings.largest_recall(results)
    kept = listed(percent(row, "kept_atom") for row in rows)
    recalled = f"SAEs of writes, recall models: {kept} of answers kept"
    papers = f"beats deletion at {papers_value('R1'):.0%}", f"8% → {papers_value('I4'):.0%}"
    states, writes = f"{centred}; {state} if no mean is subtracted", percent(win_rate(results, "write"), *WIN)
    scaled = [win_rate(results, target, amplitude="projection").win_rate for target in ("write", "state")]
    random = win_rate(results, "write", amplitude="projection", condition="random").win_rate
    fitted_write = f"; scaled to fit the write {scaled[0]:.0%} (of *states* {scaled[1]:.0%}, random {random:.0%})"
    near, far = (findings.in_every_cell(results, "layerwise", distance) for distance in (3, 40))
    next_token = f"{near} after 3 tokens; {far} after 40 (n = {findings.counts_in_every_cell(results)})"
    words = f"{said.included_native:.1%} → {said.included_edited:.1%}"
    formula = f"R² {papers_value('C1'):.2f}", f"R² {fitted:.2f} (four sizes)"
    rows = [  # question, the paper's number, ours, claim, page
        ("Can an atom of an SAE of *states* stand for a write?", papers[0], states, "R1", "05_replacement"),
        ("Can an atom of an SAE of *writes*?", "–", f"{writes} (no mean){fitted_write}", "", "05_replacement"),
        ("Where do atoms of states fail?", "–", memory, "", "14_every_cell"),
        ("Does the paper's formula, with a fitted scalar, predict a logit?", *formula, "C1", "04_logit_shift"),
        ("Does our formula, without a fit?", "–", f"R² {closed} at a write's size", "", "04_logit_shift"),
        ("Do three writes make the model say a word?", papers[1], words, "I4", "12_install"),
        ("Do writes of the native size in every cell?", "–", next_token, "", "12_install"),
        ("Do rank-1 atoms work in larger states?", "–", recalled, "", "17_recall"),
        ("Do atoms come back in another seed?", "under 1%", again, "A5", "19_recurrence"),
    ]
    status = results.rows("scorecard", host=MAIN).set_index("id").status
    statuses = {claim: status[claim] for *_, claim, _ in rows if claim} | {"": "new"}
    statuses["I4"] = statuses["I4"].replace("equivalent", "no effect")
    statuses["A5"] += f"; {findings.verdict_on_main_saes(results)}"
    lines = [[*texts, statuses[claim], page(name)] for *texts, claim, name in rows]
    return table("Question | Paper | Here | Verdict | Page", lines)


@block
def contents(results, bench) -> str:
    """The pages: number and name."""
    pages = sorted(order.notebooks())
    lines = [f"[{name[:2]}](notebooks/{name}.ipynb) {name[3:].replace('_', ' ')}" for name in pages]
    return " ·\n".join(lines)


@block
def verdicts(results, bench) -> str:
    kept = results.rows("scorecard", counts=True)
    return listed(f"{(kept.status == name).sum()} {name}" for name in VERDICTS)


@block
def rewritten(results, bench) -> str:
    """How many of the paper's claims have a criterion that was changed after results under an older one."""
    return str(sum(bool(criterion.was) for criterion in read_criteria().claims.values()))


@block
def trust(results, bench) -> str:
    """How many claims are judged, how many repeated verdicts changed, how many rest on one training."""
    kept, repeated = results.rows("scorecard", counts=True), results.rows("repeats_verdicts")
    every = results.rows("scorecard").query("group != 'extension'")
    judged = set(every[every.value.notna() & (every.group != "cannot_fail")].id)
    changed = sum(bool(read_criteria().claims[claim].was) for claim in judged)
    return (
        f"{len(judged)} of the paper's {every.id.nunique()} numbers are judged, by "
        f"[criteria](paper/criteria.yaml) fixed before the run ([exceptions](docs/scorecard.md)), {changed} rewritten "
        f"after an earlier one. {repeated.turned.sum()} of {len(repeated)} verdicts changed in another run; "
        f"{(kept.trainings == 1).sum()} of {len(kept)} rest on one training."
    )


@block
def differ(results, bench) -> str:
    row = results.row("verdict_repeats", compared="whole runs with other seeds", kind="observed")
    return percent(row, "differ")


@block
def papers_protocol(results, bench) -> str:
    row = results.rows("causes").iloc[0]
    every = results.row("replacement_summary", host=MAIN, cells="pooled", target="state", amplitude="coefficient")
    rates = percent(row, "value", "low", "high"), percent(every, "win_rate", "passage_low", "passage_high")
    return f"{rates[0]} of {row.n:,.0f} firings, and {rates[1]} of {every.n:,}"


@block
def rungs(results, bench) -> str:
    amplitudes = [findings.ladder_ahead(results, amplitude) for amplitude in ("", "_projection")]
    return f"{amplitudes[0]} ahead ({amplitudes[1]} with atoms scaled to fit the write)"


@block
def larger(results, bench) -> str:
    """Win rates of the largest and of the smallest SAE of the ladder."""
    small, large = findings.ends_of_ladder(results)
    rates = f"{large.state:.0%} (states) and {large.write:.0%} (writes)"
    return f"{rates}; {small.n_atoms} atoms (retrained), {small.state:.0%} and {small.write:.0%}"


@block
def errors(results, bench) -> str:
    return findings.errors_of_ladder(results)


@block
def deletion(results, bench) -> str:
    """What deleting a write does on each host."""
    rows = [win_rate(results, "state", host=host) for host in HOSTS]
    return listed(f"{1000 * row.kl_delete_median:.2g}" for row in rows)


@block
def cosine(results, bench) -> str:
    """The rank correlation of wins with the cosine where the state is replaced, over three cells."""
    none, mean = (findings.cosine(results, centre=centre) for centre in ("none", "mean"))
    return f"{none} without the mean, but {mean} if subtracted, as in the paper's text"


@block
def models(results, bench) -> str:
    states, writes = (findings.rates_of_models(results, target) for target in ("state", "write"))
    return (
        f"{len(findings.more_hosts(results))} of Gated DeltaNet: atoms of states win at {states}, of writes at {writes}"
    )


@block
def models_ahead(results, bench) -> str:
    centres = (findings.headline_over_hosts(results, centre) for centre in ("none", "mean"))
    return "{} points in the mean over models, and by {} if the SAEs subtract the mean of the data".format(*centres)


@block
def memory(results, bench) -> str:
    half_life = results.row("cells", host=MAIN, place="regime").half_life_median
    wins = percent(win_rate(results, "state", cells="regime"), *WIN)
    return f"{half_life:.1f} tokens, the state-trained atom wins at {wins}"


# docs/


@block
def headline(results, bench) -> str:
    """Each training's win rate, in every cell that is tested, with floor."""
    rows = []
    for name, (host, cells) in findings.CELLS.items():
        where = dict(host=host, cells=cells)
        first, shown = win_rate(results, "write", **where), []
        for target, centre in product(("state", "write"), ("none", "mean")):
            floor = win_rate(results, target, centre, condition="random", **where).win_rate
            shown.append(f"{estimate(win_rate(results, target, centre, **where), *WIN)}; {100 * floor:.0f}")
        rows.append([f"{name} (n = {first.n:,}, seeds: {first.seeds})", *shown])
    header = "atom; random atom of the same SAE (% of places) | states, no mean | states, mean subtracted"
    return table(f"{header} | writes, no mean | writes, mean subtracted", rows)


@block
def causes(results, bench) -> str:
    """From the paper's number to ours, one difference at a time."""
    rows = [["the paper, on its host", f"{100 * papers_value('R1'):.1f}"]]
    for row in results.rows("causes").to_dict("records"):
        text = estimate(row, "value", "low", "high", 1)
        if row["quantity"] == "difference":
            text = f"{'' if row['value'] < 0 else '+'}{text.replace(' ', ' points ', 1)}"
            alone = f"{100 * row['states_and_deletion']:+z.1f}"
            text += f" over all SAEs and controls; {alone} for SAEs of states against deletion"
        rows.append([row["cause"], text])
    return table("what is measured | atom beats deletion, % of firings or places", rows)


def _higher(results: Results, one: tuple[str, str], other: tuple[str, str]) -> str:
    """Return in how many cells one training (target, centre) wins more often, and by how many points."""
    cells = [dict(host=host, cells=cells) for host, cells in findings.CELLS.values() if cells != "pooled"]
    rates = [[100 * win_rate(results, *training, **cell).win_rate for training in (one, other)] for cell in cells]
    apart = [first - second for first, second in rates]
    return f"{sum(x > 0 for x in apart)} of {len(apart)} cells (by {min(apart):.0f} to {max(apart):.0f} points)"


@block
def write_ahead(results, bench) -> str:
    rows = results.rows("headline_contrasts", centre="none", amplitude="coefficient").query("cells != 'pooled'")
    surely = rows.merge(pd.DataFrame(findings.CELLS.values(), columns=["host", "cells"])).difference_low > 0
    return f"{_higher(results, ('write', 'none'), ('state', 'none'))}, with an interval above 0 in {surely.sum()}"


@block
def ahead_at_best(results, bench) -> str:
    """How far writes are ahead with atoms scaled to fit the write, on each host."""
    where = dict(centre="none", amplitude="projection", cells="pooled")
    rows = [results.row("headline_contrasts", host=host, **where) for host in HOSTS]
    return listed(estimate(row, "difference") for row in rows)


@block
def recovered(results, bench) -> str:
    shares = (percent(win_rate(results, target), "recovered") for target in ("write", "state"))
    return "{} (writes) and {} (states)".format(*shares)


@block
def mean_lower(results, bench) -> str:
    return _higher(results, ("write", "none"), ("write", "mean"))


@block
def middle_cell(results, bench) -> str:
    """How often the state-trained atom beats deletion in the middle cell, wherever a page says so."""
    where = dict(host=MAIN, target="state")
    own, bars = dict(amplitude="coefficient"), ("win_rate", "boot_low", "boot_high")
    firings = results.row("replacement_summary", cells="middle", **where, **own)
    atoms = results.row("population_summary", **where, **own, **{"class": "all"})
    cell = results.rows("cells", host=MAIN, place="middle").iloc[0]
    head = results.row("heads", head=cell["head"], layer=cell.layer, **where, **own)
    short = results.row("ablations", place="middle", variant="bilinear+rank1", **where)
    ablated = [f"{x}_coefficient" for x in bars]
    rows = [
        ("05_replacement", "places by position, no mean", win_rate(results, "state", cells="middle"), WIN),
        ("05_replacement", "places by position", win_rate(results, "state", "mean", cells="middle"), WIN),
        ("05_replacement", "equally many firings per atom", firings, bars),
        ("09_population", "mean over atoms", atoms, ("mean_win_rate", "ci_low", "ci_high")),
        ("15_multiverse", "smaller SAE, one head among four", head, bars),
        ("13_ablations", f"short training, {short.n_atoms} atoms", short, ablated),
    ]
    lines = []
    for name, what, row, columns in rows:
        lines.append([page(name), what, f"{row.get('n', row.get('n_firings')):,.0f}", percent(row, *columns)])
    return table("page | how it is counted | n | atom beats deletion", lines)


@block
def all_findings(results, bench) -> str:
    """The sentence of every page."""
    lines = [f"**{page(name)}** {said(results)}" for name, (said, _) in answers.PAGES.items()]
    return "\n\n" + "\n\n".join(lines) + "\n\n"


@block
def verdict_counts(results, bench) -> str:
    kept = results.rows("scorecard", counts=True)
    repeated = results.rows("repeats_verdicts")
    tables, rows = (kept, repeated, repeated[~repeated.turned]), []
    for host in HOSTS:
        counts = [[int(((x.host == host) & (x.status == name)).sum()) for x in tables] for name in VERDICTS]
        form = "{} ({}, {})" if (repeated.host == host).any() else "{}"
        rows.append([HOST[host], *(form.format(*count) for count in counts)])
    return table(f"host | {' | '.join(VERDICTS)}", rows)


@block
def symbols(results, bench) -> str:
    """The paper's symbols beside the names in the code."""
    symbols = pd.read_csv(ROOT / "paper" / "symbols.csv").itertuples()
    rows = [[f"`{x.symbol}`", x.meaning, f"`{x.code}`", f"`{x.where}`"] for x in symbols]
    return table("paper | meaning | name in the code | where", rows)


@block
def all_claims(results, bench) -> str:
    """Every claim, in words, with the paper's number, ours and the verdict on each host, group by group."""
    titles = dict(headline="Headline", supporting="Supporting", bookkeeping="Facts about the dictionary and the text")
    titles |= dict(cannot_fail="Not judged, because nothing could contradict them")
    parts, header = [], f"claim | | paper | {' | '.join(map(HOST.get, HOSTS))} | page and rows"
    for group, title in titles.items():
        claims = results.rows("scorecard", group=group).groupby("id", sort=False)
        rows = table(header, [claim_row(name, rows) for name, rows in claims])
        parts.append(f"### {title}{rows.rstrip()}")
    return "\n\n" + "\n\n".join(parts) + "\n\n"


def measured(claim: str, notebook: str) -> str:
    """Return links to the page that measures a claim, at the cell that makes the table, and to the table."""
    read = []

    def tables(table: str):
        read.append(table)
        raise LookupError

    with suppress(LookupError):
        read_criteria().claims[claim].answer(tables, MAIN)
    anchor = f"#{read[0]}" if f"results/{{profile}}/{read[0]}.csv" in order.notebooks()[notebook].makes else ""
    return f"[{notebook[:2]}](notebooks/{notebook}.ipynb{anchor}), [rows](results/mini/{read[0]}.csv)"


def claim_row(name: str, rows: pd.DataFrame) -> list[str]:
    """Return the cells of one claim. rows: its rows of scorecard.csv."""
    first, asked = rows.iloc[0], rows[rows.value.notna()].set_index("host")
    cells = []
    for host in HOSTS:
        if host not in asked.index:
            cells.append("")
            continue
        row = asked.loc[host]
        status = f"as {row.same_as}" if isinstance(row.same_as, str) else row.status.replace("not asked", "")
        cells.append(f"{row.value:.3g} [{row.ci_low:.3g}, {row.ci_high:.3g}] {status}")
    paper = "" if pd.isna(first.paper_value) else f"{first.paper_value:g}"
    where = measured(name, first.notebook) if isinstance(first.notebook, str) else "not run here"
    return [name, first.claim, paper, *cells, where]


@block
def holm(results, bench) -> str:
    kept = results.rows("scorecard", counts=True)
    settled = kept[kept.status != "unsettled"]
    return f"{len(settled)} are settled, {(settled.holm <= 0.05).sum()} after Holm's adjustment within their host"


@block
def closed_form(results, bench) -> str:
    """Median R2 of each predictor at each size."""
    names = dict(paper="the paper's formula", paper_fitted="the same, fitted", exact="first order")
    names |= dict(through_layer="through the edited layer", through_norm="through layer and final norm")
    sizes = (0.1, 0.3, 1.0, 3.0, 10.0)
    rows = [
        [HOST[host], name, *(f"{r2(results, key, eps, host):.3g}" for eps in sizes)]
        for host in HOSTS
        for key, name in names.items()
    ]
    return table(f"host | predictor | {' | '.join(f'{eps:g}' for eps in sizes)}", rows)


@block
def costs(results, bench) -> str:
    """How many times as fast as the plain way, with the lowest and the highest round."""

    def times(rows: pd.DataFrame) -> str:
        def short(x: float) -> str:
            return f"{x:.0f}" if x >= 10 else f"{x:.2g}"

        return "; ".join(f"{short(x.ratio)} [{short(x.low)}, {short(x.high)}]" for x in rows.itertuples())

    rows = []

    def add(what: str, against: str, name: str, **case) -> None:
        rows.append([what, against, times(bench.rows(name, **case))])

    for n in (64, 128, 256):
        recipe = "the paper's recipe on states in memory"
        add(f"training step, states of {n} x {n}", recipe, "training_step", case=f"plain {n}")
        add("the same", "states in memory, active atoms only", "training_step", case=f"dense {n}")
    add("the same, 128 x 128", "the recipe on all 1,024 states at once", "training_step", case="whole 128")
    for host in HOSTS:
        against = "our own forward pass (transformers has none)" if host == "rwkv7" else "the library's forward pass"
        what = f"harvest of all heads of the last recurrent layer, {HOST[host]}"
        add(what, against, "harvest_speed", case="forward", host=host)
    for depth, conditions in (("early", 3), ("late", 3), ("late", 16)):
        what, case = f"replacement, {conditions} conditions, {depth} layer", dict(case="plain", depth=depth)
        add(what, "transformers from a copied cache, firing by firing", "replacement", **case, conditions=conditions)
    for case, way in {"one by one": "one forward pass per atom", "batched": "forward passes in batches"}.items():
        add("closed form of 256 atoms from one backward pass", way, "closed_form", case=case)
    for side in (64, 128):
        what = f"attention map of a head, 128 tokens, {side} per side"
        add(what, "each write alone, token by token, in Python", "attribution", case="plain", side=side)
    against = "transformers from a copied cache, trial by trial"
    add("writes in all 24 cells, 64 trials", against, "many_cells", case="plain")
    return table("what | against | times as fast", rows)


@block
def plan(results, bench) -> str:
    """What five million tokens of 16 heads in 3 layers of Qwen3.5-0.8B cost."""
    names = dict(factored="factors (this repository)", plain="states (the paper's recipe)")
    rows = []
    for x in bench.rows("plan").itertuples():
        machine = f"{x.machine}, two cores" if x.by == "measured" else f"{x.machine}, from its {x.by}"
        row = [names[x.way], machine, f"{x.disk_gb_a_layer:,.0f} GB", f"{x.harvest_hours:.2g}"]
        rows.append([*row, f"{x.training_hours:.3g}", f"{x.memory_gib:.1f} GiB"])
    header = "kept | machine | disk, one layer at a time | harvest, hours | training, hours"
    return table(f"{header} | memory of a step", rows)


COLAB = "https://colab.research.google.com/github"
BINDER = "https://mybinder.org/v2/gh"
TOUR = Path("notebooks") / "tour.ipynb"


def address() -> str:
    """Return where the repository is on GitHub, `Repository` of [project.urls] in pyproject.toml; else ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project.get("urls", {}).get("Repository", "").removesuffix("/")


def buttons(repository: str) -> str:
    """Return links that open the tour in Colab and on Binder; nothing without an address."""
    if not repository:
        return ""
    name, tour = repository.removeprefix("https://github.com/"), TOUR.as_posix()
    colab, binder = f"{COLAB}/{name}/blob/main/{tour}", f"{BINDER}/{name}/HEAD?labpath={tour}"
    return f"**[Open in Colab]({colab})** · **[Open on Binder]({binder})**"


@block
def online(results: Results, bench: Results) -> str:
    unknown = "The links appear here when pyproject.toml has the repository's address on GitHub (`Repository` of "
    return buttons(address()) or f"{unknown}`[project.urls]`), after `python -m replication readme`."


def with_buttons(tour: nbformat.NotebookNode, repository: str) -> nbformat.NotebookNode:
    """Return the tour with its links to Colab and Binder, and with the address that it is fetched from."""
    tour = deepcopy(tour)
    first, install = tour.cells[0], next(cell for cell in tour.cells if cell.cell_type == "code")
    first.source = MARKED.sub(lambda match: match[1] + buttons(repository) + match[4], first.source)
    install.source = re.sub(r'^repository = ".*?"', f'repository = "{repository}"', install.source, flags=re.M)
    return tour


def fill(text: str, results: Results, bench: Results, root: str = "") -> str:
    """Return `text` with all marked places filled from the results.

    root: the path from the document's folder to the repository's. Raises ValueError for an unknown name."""

    def filled(match: re.Match) -> str:
        begin, name, _, end = match.groups()
        if name not in BLOCKS:
            raise ValueError(f"There is no number {name!r}: choose one of {', '.join(sorted(BLOCKS))}.")
        return begin + re.sub(r"\]\((?=notebooks/|results/)", f"]({root}", BLOCKS[name](results, bench)) + end

    return MARKED.sub(filled, text)


def documents() -> dict[Path, str]:
    """Return the documents with marked places, and the path from the folder of each to the repository's."""
    return {ROOT / "README.md": ""} | dict.fromkeys(sorted((ROOT / "docs").glob("*.md")), "../")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "mini", help="default: results/mini")


def main(options: argparse.Namespace) -> int:
    from replication.commands.teaser import draw

    results, bench = Results(options.results), Results(ROOT / "results" / "bench")
    for path, root in documents().items():
        before = path.read_text(encoding="utf-8")
        if (after := fill(before, results, bench, root)) != before:
            path.write_text(after, encoding="utf-8")
            print(f"{path.relative_to(ROOT)} has new numbers")
    tour = nbformat.read(ROOT / TOUR, as_version=4)
    if (after := with_buttons(tour, address())) != tour:
        nbformat.write(after, ROOT / TOUR)
        print(f"{TOUR} has a new address")
    draw(results, ROOT / "docs" / "images")
    write_crate(ROOT / "results")
    return 0
