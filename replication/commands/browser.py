"""The atom browser: every atom of every cell on one page, figures/<profile>/atoms.html, which opens from disk.

    python -m replication browser --profile mini

Numbers come from the tables in results/<profile> as the notebooks left them; contexts, histograms and promoted tokens
are worked out from the trained SAEs in build/<profile>, once, and kept there. The page (browser.html beside this file)
holds its data as JSON and asks nothing of a network.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from replication.classes import Scan
from replication.commands import CommandError
from replication.html import PROMOTED_FIRINGS, contexts, fires_on, plain
from replication.pages import promoted as promoted_module
from replication.pages.replacement import CONTROLS
from replication.plots import CONDITION
from replication.statistics import wilson
from replication.study.stages import rows_with
from replication.study.study import Suite, open_suite
from writesae.evaluate import promoted
from writesae.evaluate.atoms import ATOM_KEYS, top_contexts
from writesae.evaluate.replacement import AMPLITUDES, CONDITIONS
from writesae.files import ArtifactError, read_sidecar, write_atomically

TEMPLATE = Path(__file__).with_name("browser.html")
REQUIRED = dict(cells="00_hosts", saes="02_train_saes", atoms="03_atoms", replacement="05_replacement")
OPTIONAL = dict(
    replacement_by_cell="05_replacement",
    logit_shift="04_logit_shift",
    population="07_population",
    cache_preferred="09_cache_edits",
)
COEFFICIENT_BINS, POSITION_BINS = 20, 16
CONTEXTS = 4  # of each atom
TOKENS = 4  # promoted and demoted tokens of each kind
MOST_BYTES = 5_000_000


# Tables


def read_tables(suite: Suite) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """The tables that the page shows, and a sentence for each one that is missing and that it can do without.

    Raises ArtifactError, with one sentence that names the notebook, where a table is missing that it cannot do without.
    """
    tables, notes = {}, []
    for name, notebook in (REQUIRED | OPTIONAL).items():
        if (suite.paths.results / f"{name}.csv").is_file():
            tables[name] = suite.table(name)
            continue
        folder, made = suite.paths.results.name, f"`make {notebook} PROFILE={suite.profile.name}` makes it"
        if name in REQUIRED:
            raise ArtifactError(f"The table {name}.csv is missing in results/{folder}: {made}.")
        notes.append(f"Not shown here: the table {name}.csv is missing in results/{folder}; {made}.")
    return tables, notes


def of_cell(table: pd.DataFrame, where: dict) -> pd.DataFrame:
    """The rows of a table in which the columns have these values; columns that the table lacks do not count."""
    return rows_with(table, **{name: value for name, value in where.items() if name in table})


def intervals(wins: Sequence[int], counts: Sequence[int]) -> dict[str, list]:
    """Wilson's interval of each share, as lists low and high."""
    found = [wilson(int(w), int(n)) for w, n in zip(wins, counts, strict=True)]
    return dict(low=plain([x.low for x in found], 3), high=plain([x.high for x in found], 3))


def tested(firings: pd.DataFrame, atoms: Sequence[int]) -> dict[str, dict]:
    """What the replacement test says of each atom, for each amplitude; lists in the order of `atoms`, None where an atom
    was not tested.

    n firings, wins of the atom over deletion with Wilson's interval, kl: the mean KL of each condition in nats; beats:
    on how many firings a control has the lower KL than deletion; beaten: on how many the atom has the lower KL than it.
    All of read scope "write"; cache_wins of cache_n is the atom over deletion where only later tokens read the edit.
    """
    found = {}
    for amplitude in AMPLITUDES:
        part = firings[firings.amplitude == amplitude]
        cache, part = part[part["read"] == "cache"], part[part["read"] == "write"]
        there = [name for name in CONDITIONS if f"kl_{name}" in part and part[f"kl_{name}"].notna().any()]
        controls = [name for name in there if name in CONTROLS]
        told = part.assign(n=1, wins=part.kl_atom < part.kl_delete)
        beats = {f"beats_{x}": told[f"kl_{x}"] < told.kl_delete for x in controls}
        beaten = {f"beaten_{x}": told.kl_atom < told[f"kl_{x}"] for x in controls}
        told = told.assign(**beats, **beaten)
        counts = told.groupby("atom")[["n", "wins", *beats, *beaten]].sum()
        means = told.groupby("atom")[[f"kl_{x}" for x in there]].mean().reindex(atoms)
        row = intervals(counts.wins, counts.n)
        counts = counts.assign(**row).reindex(atoms)
        found[amplitude] = {name: plain(counts[name]) for name in ("n", "wins", "low", "high")} | dict(
            kl={x: plain(means[f"kl_{x}"], 3) for x in there},
            beats={x: plain(counts[f"beats_{x}"]) for x in controls},
            beaten={x: plain(counts[f"beaten_{x}"]) for x in controls},
        )
        if len(cache):
            later = cache.assign(n=1, wins=cache.kl_atom < cache.kl_delete).groupby("atom")[["n", "wins"]].sum()
            later = later.reindex(atoms)
            found[amplitude] |= dict(cache_n=plain(later.n), cache_wins=plain(later.wins))
    return found


def drawn(population: pd.DataFrame) -> dict[int, dict]:
    """What the population test says of each atom that it drew: atom -> amplitude -> n, wins, low, high."""
    found: dict[int, dict] = {}
    for row in population.itertuples():
        wins = round(row.win_rate * row.firings)
        interval = intervals([wins], [row.firings])
        one = dict(n=row.firings, wins=wins, low=interval["low"][0], high=interval["high"][0])
        found.setdefault(row.atom, {})[row.amplitude] = one
    return found


def scored(shifts: pd.DataFrame) -> dict:
    """R2 of the logit-shift predictors: the sizes eps, n prompts, and atom -> predictor -> R2 at each eps."""
    if shifts.empty:
        return {}
    wide = shifts.pivot(index=["atom", "predictor"], columns="eps", values="r2")
    rows: dict[int, dict] = {}
    for (atom, predictor), values in wide.iterrows():
        rows.setdefault(int(atom), {})[predictor] = plain(values, 3)
    return dict(eps=wide.columns.tolist(), n=int(shifts.n.iloc[0]), atoms=rows)


def histograms(firings: pd.DataFrame, window: int) -> dict[int, list]:
    """atom -> [its largest coefficient, counts of its firings by coefficient (from 0 to the largest), counts by position
    in the window]."""
    found = {}
    for atom, own in firings.groupby("atom"):
        most = own.coefficient.max()
        size, _ = np.histogram(own.coefficient, COEFFICIENT_BINS, range=(0, most))
        place, _ = np.histogram(own.position, POSITION_BINS, range=(0, window))
        found[atom] = [*plain([most], 3), size.tolist(), place.tolist()]
    return found


def tokens_of(table: pd.DataFrame) -> dict[int, list]:
    """atom -> [n firings, then of each of promoted.KINDS: token numbers and shifts of the promoted, of the demoted, R2]."""
    found: dict[int, list] = {}
    for row in table.sort_values("rank", kind="stable").itertuples():
        kinds = found.setdefault(row.atom, [row.n, *([[], [], [], [], None] for _ in promoted.KINDS)])
        one, side = kinds[1 + promoted.KINDS.index(row.kind)], 2 * (row.direction == "demoted")
        one[side].append(row.token)
        one[side + 1] += plain([row.shift], 2)
        one[4] = plain([row.r2], 3)[0]
    return found


# The page's data


def all_firings(suite: Suite, scan: Scan) -> pd.DataFrame:
    """Every firing of the host's own SAEs (kept in build/ only: 53,000 lines an SAE)."""
    targets, write = suite.profile.saes.targets, suite.profile.saes.write

    def compute(_: str) -> pd.DataFrame:
        tables = []
        for layer, head in scan.places:
            for target in targets:
                where = dict(host=scan.host, layer=layer, head=head, target=target)
                tables.append(scan.firings(layer, head, target, "main")[1].assign(**where))
        return pd.concat(tables, ignore_index=True)

    inputs = dict(data=suite.profile.data, saes=suite.sae_files(scan.host), write=write, targets=targets)
    modules = ["replication.pages.atoms"]
    inputs["cells"] = list(scan.places)
    return suite.staged("browser_firings", scan.host, [scan.host], compute, modules, inputs)


def describe(tables: dict, where: dict, role: str) -> dict:
    """A cell and its SAE: place, memory, size, error."""
    sae = of_cell(tables["saes"], where | dict(role=role))
    cell = of_cell(tables["cells"], where)
    found = dict(where, role=role, place=cell.place.iloc[0] if len(cell) else "")
    found |= {name: plain(sae[name][:1])[0] for name in ("n_atoms", "k", "fvu") if len(sae)}
    return found | {name: plain(cell[name][:1])[0] for name in ("half_life_median", "sigma1_over_sigma2") if len(cell)}


def own_sae(suite: Suite, tables: dict, scan: Scan, where: dict, firings: pd.DataFrame, tokens: pd.DataFrame) -> dict:
    """Everything that the page shows of one of the profile's own SAEs.

    Raises ArtifactError where the SAEs in build/ are not those that the tables are about."""
    name, tokenizer = where["host"], suite.host(where["host"]).tokenizer
    table = of_cell(tables["atoms"], where | dict(role="main")).sort_values("atom")
    counts = firings.groupby("atom").size()
    if counts.to_dict() != dict(zip(table.atom, table.firings, strict=True)):
        raise ArtifactError(
            f"results/{suite.profile.name}/atoms.csv and the SAEs in build/{suite.profile.name} are not of one run "
            f"(their firings in {name} L{where['layer']} H{where['head']} differ): `make 03_atoms` makes them agree."
        )
    atoms = table.atom.tolist()
    columns = {"atom": atoms, "class": table["class"].tolist()}
    for column in ("cosine", "cosine_key", "cosine_value", "elsewhere", "rate"):
        columns[column] = plain(table[column])
    columns |= dict(firings=table.firings.tolist(), passages=table.passages.tolist())
    parts = dict(
        contexts=contexts(tokenizer, scan.windows, firings, CONTEXTS),
        histogram=histograms(firings, suite.profile.data.window),
        fires_on=fires_on(tokenizer, scan.windows, firings),
        tokens=tokens_of(of_cell(tokens, where)),
    )
    columns |= {column: [part[a] for a in atoms] for column, part in parts.items()}
    test = of_cell(tables["replacement"], where)
    found = describe(tables, where, "main") | dict(columns=columns, test=tested(test, atoms), n_tested=_firings(test))
    found |= dict(scanned=scan.scanned(), windows=len(scan.windows), passages=len(scan.windows.passage.unique()))
    if "population" in tables:
        found["population"] = drawn(of_cell(tables["population"], where))
    if "logit_shift" in tables and where["target"] == suite.profile.section("logit_shift", name).target:
        found["logit_shift"] = scored(of_cell(tables["logit_shift"], where))
    if "cache_preferred" in tables:
        kept = of_cell(tables["cache_preferred"], where)[["atom", "token_from", "text", "score", "firings"]]
        found["preferred"] = kept.to_dict("records")
    return found


def _firings(test: pd.DataFrame) -> int:
    """How many firings a replacement table is about."""
    return len(test[(test.amplitude == AMPLITUDES[0]) & (test["read"] == "write")])


def survey_saes(suite: Suite, tables: dict, name: str) -> list[dict]:
    """The smaller SAEs of every cell of a host: only the atoms that were tested, at the firings at which they were."""
    if "replacement_by_cell" not in tables:
        return []
    table, tokenizer = tables["replacement_by_cell"], suite.host(name).tokenizer
    found, windows = [], suite.windows(name, "heldout")
    for (layer, head, target), test in table[table.host == name].groupby(["layer", "head", "target"]):
        where = dict(host=name, layer=int(layer), head=int(head), target=target)
        firings = test.drop_duplicates(["window", "position", "atom"]).assign(**where)
        atoms = sorted(firings.atom.unique().tolist())
        columns = dict(atom=atoms, cosine=plain(firings.groupby("atom").cosine.median().loc[atoms]))
        parts = dict(
            contexts=contexts(tokenizer, windows, firings, CONTEXTS), fires_on=fires_on(tokenizer, windows, firings)
        )
        columns |= {column: [part[a] for a in atoms] for column, part in parts.items()}
        found.append(
            describe(tables, where, "survey") | dict(columns=columns, test=tested(test, atoms), n_tested=_firings(test))
        )
    return found


def collect(suite: Suite) -> dict:
    """The data of the page. Raises ArtifactError where a table is missing, and FileNotFoundError for an SAE."""
    tables, notes = read_tables(suite)
    saes, survey, vocabulary = [], [], {}
    for name in suite.profile.hosts:
        scan = Scan(suite, name)
        firings = all_firings(suite, scan)
        groups = [dict(zip(ATOM_KEYS[:4], keys, strict=True)) for keys, _ in firings.groupby(ATOM_KEYS[:4], sort=False)]
        parts = [of_cell(firings, where) for where in groups]
        looked_at = [_looked_at(suite, scan, where, part) for where, part in zip(groups, parts)]
        tokens = promoted_module.run(suite, name, scan.windows, looked_at, TOKENS)
        decode = suite.host(name).tokenizer.decode
        vocabulary[name] = {int(t): decode([t]) for t in sorted(tokens.token.unique())}
        saes += [own_sae(suite, tables, scan, w, part, tokens) for w, part in zip(groups, parts)]
        survey += survey_saes(suite, tables, name)
    made = read_sidecar(suite.paths.results / "replacement.csv")
    source = dict(profile=suite.profile.name, commit=made.get("commit", "unknown"), window=suite.profile.data.window)
    return dict(source=source, notes=notes, colours=CONDITION, vocabulary=vocabulary, saes=saes + survey)


def _looked_at(suite: Suite, scan: Scan, where: dict, firings: pd.DataFrame) -> promoted.Dictionary:
    """The firings over which an SAE's promoted tokens are averaged: the atoms' top contexts."""
    largest = top_contexts(suite.host(scan.host).tokenizer, scan.windows, firings, PROMOTED_FIRINGS)
    picked = largest.sort_values(["window", "position"])
    sae = suite.sae(scan.host, where["layer"], where["head"], where["target"])
    return promoted.Dictionary(where["layer"], where["head"], where["target"], sae, picked)


# The page


def embedded(data: dict) -> str:
    """JSON that can stand in a script element whatever text is in it."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def render(data: dict) -> str:
    """The page, complete. Its policy lets it run its own script and nothing else, and load nothing."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return template.replace("SCRIPT_HASH", f"sha256-{digest}", 1).replace("PAGE_DATA", embedded(data), 1)


def page(data: dict) -> bytes:
    """The page in UTF-8; without the survey's cells, and with a note that says so, where it would be too large.

    Raises ValueError where it is too large even so."""
    whole = render(data).encode("utf-8", "replace")
    if len(whole) > MOST_BYTES:
        note = f"The cells of the survey are left out: with them the page would have {len(whole) / 1e6:.1f} MB."
        kept = [sae for sae in data["saes"] if sae["role"] == "main"]
        whole = render(data | dict(saes=kept, notes=[*data["notes"], note])).encode("utf-8", "replace")
    if len(whole) > MOST_BYTES:
        raise ValueError(
            f"The page would have {len(whole):,} bytes, more than {MOST_BYTES:,}: give the profile fewer cells."
        )
    return whole


def write(suite: Suite) -> Path:
    """figures/<profile>/atoms.html; it appears whole or not at all. Raises as `collect` and `page` do."""
    content, path = page(collect(suite)), suite.paths.figures / "atoms.html"
    write_atomically(path, lambda partial: partial.write_bytes(content))
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    try:
        path = write(open_suite(options.profile))
    except FileNotFoundError as error:
        raise CommandError(
            f"a trained SAE is missing ({error}): `make 02_train_saes PROFILE={options.profile}` makes it."
        ) from error
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
