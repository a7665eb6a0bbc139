"""The atom browser: one page with every atom of every cell, figures/<profile>/atoms.html.

All numbers come from tables: those in results/<profile>, and in build/<profile> the firings that notebook 03
stores and the promoted tokens, computed once. The page (browser.html, with its data as JSON) uses no network.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pandas as pd

from replication.classes import scanned
from replication.commands import CommandError, neuronpedia
from replication.html import contexts, fires_on, plain
from replication.pages import atoms as atoms_page
from replication.pages import promoted as promoted_page
from replication.pages.replacement import CONTROLS
from replication.plots import CONDITION
from replication.statistics import wilson
from replication.study.firings import firing_windows
from replication.study.stages import rows_with
from replication.study.study import Study, open_study
from writesae.evaluate.atoms import ATOM_KEYS, top_firings
from writesae.evaluate.attribution import shares, weights
from writesae.evaluate.promoted import KINDS
from writesae.evaluate.replacement import AMPLITUDES, CONDITIONS
from writesae.files import ArtifactError, local_path, read_sidecar, write_atomically
from writesae.hosts.base import Host
from writesae.text import Windows

TEMPLATE = Path(__file__).with_name("browser.html")
REQUIRED = dict(cells="00_hosts", saes="02_train_saes", atoms="03_atoms", replacement="05_replacement")
OPTIONAL = dict(replacement_by_cell="05_replacement", logit_shift="04_logit_shift")
OPTIONAL |= dict(population="09_population", cache_preferred="11_cache_edits")
COEFFICIENT_BINS, POSITION_BINS = 20, 16
CONTEXTS = 4  # per atom
READERS = 3  # per context
TOKENS = 4  # promoted and demoted tokens of each kind
MAXIMUM_BYTES = 5_000_000


# Tables


def read_tables(study: Study) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return the tables of the page, and a sentence for each optional one that is missing.

    Raises ArtifactError, in one sentence that names the notebook, if a required table is missing."""
    tables, notes = {}, []
    for name, notebook in (REQUIRED | OPTIONAL).items():
        if (study.paths.results / f"{name}.csv").is_file():
            tables[name] = study.table(name)
            continue
        folder, remedy = study.paths.results.name, f"`make {notebook} PROFILE={study.profile.name}` makes it"
        if name in REQUIRED:
            raise ArtifactError(f"The table {name}.csv is missing in results/{folder}: {remedy}.")
        notes.append(f"Not shown here: the table {name}.csv is missing in results/{folder}; {remedy}.")
    return tables, notes


def of_cell(table: pd.DataFrame, where: dict) -> pd.DataFrame:
    """Return the rows with these values, in the columns that the table has."""
    return rows_with(table, **{name: value for name, value in where.items() if name in table})


def intervals(wins, counts) -> dict[str, list]:
    """Return lists low and high: Wilson's interval of each share of wins, None for a count of None."""
    ends = [wilson(won, n) if n else (None, None) for won, n in zip(wins, counts, strict=True)]
    return dict(low=plain([low for low, _ in ends], 3), high=plain([high for _, high in ends], 3))


def tested(firings: pd.DataFrame, atoms: list[int]) -> dict[str, dict]:
    """Return the replacement test per amplitude, as lists in the order of `atoms` (None: untested).

    n: firings; wins: firings at which the atom's KL is below deletion's, with Wilson's interval; kl: mean KL
    per condition in nats; beats: firings at which a control's KL is below deletion's; beaten: those at which
    the atom's KL is below the control's; all in scope "write". cache_wins, cache_n: in scope "cache"."""

    def counts(table: pd.DataFrame, **columns) -> dict[str, list]:
        sums = table[["atom"]].assign(**columns).groupby("atom").sum().reindex(atoms)
        return {name: plain(sums[name]) for name in columns}

    tests, firings = {}, firings.assign(win=firings.kl_atom < firings.kl_delete)
    for amplitude in AMPLITUDES:
        table, later = (rows_with(firings, amplitude=amplitude, read=read) for read in ("write", "cache"))
        kl = {name: table[f"kl_{name}"] for name in CONDITIONS if f"kl_{name}" in table}
        kl = {name: column for name, column in kl.items() if column.notna().any()}
        controls = [name for name in kl if name in CONTROLS]
        means = pd.DataFrame(kl).groupby(table.atom).mean().reindex(atoms)
        row = counts(table, n=1, wins=table.win)
        row |= intervals(row["wins"], row["n"]) | dict(kl={name: plain(means[name], 3) for name in kl})
        row["beats"] = counts(table, **{name: kl[name] < kl["delete"] for name in controls})
        row["beaten"] = counts(table, **{name: kl["atom"] < kl[name] for name in controls})
        tests[amplitude] = row | (counts(later, cache_n=1, cache_wins=later.win) if len(later) else {})
    return tests


def drawn(population: pd.DataFrame) -> dict[int, dict]:
    """Return the population test: atom -> amplitude -> n, wins, low, high."""
    wins = (population.win_rate * population.firings).round().astype(int)
    columns = dict(n=population.firings, wins=wins, **intervals(wins, population.firings))
    table = population[["atom", "amplitude"]].assign(**columns).set_index("amplitude")
    return {atom: part[list(columns)].to_dict("index") for atom, part in table.groupby("atom")}


def scored(shifts: pd.DataFrame) -> dict:
    """Return R2 of the logit-shift predictors: eps, n prompts, and atom -> predictor -> R2 per eps."""
    if shifts.empty:
        return {}
    wide = shifts.pivot(index=["atom", "predictor"], columns="eps", values="r2")
    rows = wide.apply(plain, axis=1, result_type="reduce", digits=3)
    atoms = {atom: part.droplevel("atom").to_dict() for atom, part in rows.groupby("atom")}
    return dict(eps=wide.columns.tolist(), n=int(shifts.n.iloc[0]), atoms=atoms)


def histograms(firings: pd.DataFrame, window: int) -> dict[int, list]:
    """Return atom -> [largest coefficient, counts of firings by coefficient, counts by position]."""
    counts = {}
    for atom, rows in firings.groupby("atom"):
        largest = rows.coefficient.max()
        sizes, _ = np.histogram(rows.coefficient, COEFFICIENT_BINS, range=(0, largest))
        positions, _ = np.histogram(rows.position, POSITION_BINS, range=(0, window))
        counts[atom] = [*plain([largest], 3), sizes.tolist(), positions.tolist()]
    return counts


def tokens_of(table: pd.DataFrame) -> dict[int, list]:
    """Return atom -> [n firings, then per kind: promoted tokens, shifts, demoted tokens, shifts, R2]."""
    tokens: dict[int, list] = {}
    for row in table.sort_values("rank", kind="stable").itertuples():
        kinds = tokens.setdefault(row.atom, [row.n, *([[], [], [], [], None] for _ in KINDS)])
        kind, side = kinds[1 + KINDS.index(row.kind)], 2 * (row.direction == "demoted")
        kind[side].append(row.token)
        kind[side + 1] += plain([row.shift], 2)
        kind[4] = plain([row.r2], 3)[0]
    return tokens


def readers(study: Study, where: dict, windows: Windows, firings: pd.DataFrame) -> dict[int, list]:
    """Return atom -> per top context the later tokens that read its write most: [text, tokens later, share].

    share: of the write in the token's read of the head's state (`writesae.evaluate.attribution.shares`)."""
    host, top = study.host(where["host"]), top_firings(firings, CONTEXTS)
    given = dict(host=host, tokens=windows.tokens, top=top[["atom", "rank", "window", "position"]])
    given |= dict(layer=where["layer"], head=where["head"], size=study.profile.data.batch_windows)
    name = "readers-L{layer}-H{head}-{target}".format(**where)
    table = study.stage(name, where["host"], range(0, len(windows), given["size"]), read_most, **given)
    read = {}
    for row in table.itertuples():
        text = host.tokenizer.decode([row.token])
        read.setdefault((row.atom, row.rank), []).append([text, row.later, *plain([row.share], 2)])
    pairs = zip(top.atom, top["rank"], strict=True)
    return {atom: [read.get(x, []) for x in part] for atom, part in groupby(pairs, itemgetter(0))}


def read_most(start: int, host: Host, tokens, top: pd.DataFrame, layer: int, head: int, size: int) -> pd.DataFrame:
    """Return the READERS tokens that read each write most, in windows from `start`: token, later, share."""
    rows, top = [], top[top.window.between(start, start + size - 1)]
    run = host.run(tokens[start : start + size], upto=layer + 1)
    factors = host.factors(run, layer, head)
    share = shares(weights(factors), factors)
    for row in top.itertuples():
        read = share[row.window - start, row.position + 1 :, row.position]
        largest, places = read.topk(min(READERS, len(read)))
        found = zip(tokens[row.window, row.position + 1 + places.cpu()], places + 1, largest, strict=True)
        rows += [(row.atom, row.rank, int(token), int(later), float(x)) for token, later, x in found]
    return pd.DataFrame(rows, columns=["atom", "rank", "token", "later", "share"])


# The page's data


def entry(study: Study, tables: dict, where: dict, windows: Windows, firings, test, columns: dict) -> dict:
    """Return the page's data for any SAE: its place, memory, size and error; `columns`, with one value per
    atom and with contexts added; and its replacement test."""
    sae, cell = of_cell(tables["saes"], where), of_cell(tables["cells"], where)
    shown = where | dict(place=cell.place.iloc[0] if len(cell) else "")
    for table, names in ((sae, ("n_atoms", "k", "fvu")), (cell, ("half_life_median", "sigma1_over_sigma2"))):
        shown |= {name: plain(table[name][:1])[0] for name in names if len(table)}
    tokenizer, atoms = study.host(where["host"]).tokenizer, columns["atom"]
    texts, tokens = contexts(tokenizer, windows, firings, CONTEXTS), fires_on(tokenizer, windows, firings)
    columns |= dict(contexts=[texts[atom] for atom in atoms], fires_on=[tokens[atom] for atom in atoms])
    n_tested = len(rows_with(test, amplitude=AMPLITUDES[0], read="write"))
    return shown | dict(columns=columns, test=tested(test, atoms), n_tested=n_tested)


def main_sae(study: Study, tables: dict, where: dict, firings: pd.DataFrame, tokens: pd.DataFrame) -> dict:
    """Return what the page shows of a main SAE. Raises ArtifactError unless firings and atoms.csv match."""
    name, profile = where["host"], study.profile
    table = of_cell(tables["atoms"], where).sort_values("atom")
    if firings.groupby("atom").size().to_dict() != dict(zip(table.atom, table.firings, strict=True)):
        raise ArtifactError(
            f"results/{profile.name}/atoms.csv and the firings in build/{profile.name} are not of one run "
            f"(those in {name} L{where['layer']} H{where['head']} differ): `make 03_atoms` makes them agree."
        )
    columns = table[["atom", "class", "firings", "passages"]].to_dict("list")
    columns |= {name: plain(table[name]) for name in ("cosine", "cosine_key", "cosine_value", "elsewhere", "rate")}
    counts, promoted = histograms(firings, profile.data.window), tokens_of(of_cell(tokens, where))
    columns |= dict(histogram=[counts[a] for a in table.atom], tokens=[promoted[a] for a in table.atom])
    windows = firing_windows(study, name)
    read = readers(study, where, windows, firings)
    columns["readers"] = [read[atom] for atom in table.atom]
    shown = entry(study, tables, where, windows, firings, of_cell(tables["replacement"], where), columns)
    shown |= dict(scanned=scanned(windows, profile.data.first_position), windows=len(windows))
    shown["passages"] = len(windows.passage.unique())
    if "population" in tables:
        shown["population"] = drawn(of_cell(tables["population"], where))
    if "logit_shift" in tables and where["target"] == profile.section("logit_shift", name).target:
        shown["logit_shift"] = scored(of_cell(tables["logit_shift"], where))
    if "cache_preferred" in tables:
        names = ["atom", "token_from", "text", "score", "firings"]
        shown["preferred"] = of_cell(tables["cache_preferred"], where)[names].to_dict("records")
    return shown


def survey_saes(study: Study, tables: dict, name: str) -> list[dict]:
    """Return the survey's SAEs of a host: their tested atoms, at the tested firings."""
    if "replacement_by_cell" not in tables:
        return []
    shown, windows = [], study.windows(name, "heldout")
    for keys, test in rows_with(tables["replacement_by_cell"], host=name).groupby(ATOM_KEYS[:4]):
        firings = test.drop_duplicates(["window", "position", "atom"])
        cosines = firings.groupby("atom").cosine.median()
        where = dict(zip(ATOM_KEYS, keys), role="survey")
        columns = dict(atom=cosines.index.tolist(), cosine=plain(cosines))
        shown.append(entry(study, tables, where, windows, firings, test, columns))
    return shown


def collect(study: Study) -> dict:
    """Return the page's data. Raises ArtifactError if a table is missing, FileNotFoundError if an SAE is."""
    tables, notes = read_tables(study)
    saes, survey, vocabulary = [], [], {}
    for name in study.profile.hosts:
        firings = atoms_page.main_firings(study, name)
        tokens = promoted_page.run(study, name, firings, TOKENS)
        decode = study.host(name).tokenizer.decode
        vocabulary[name] = {int(t): decode([t]) for t in sorted(tokens.token.unique())}
        for keys, part in firings.groupby(ATOM_KEYS[:4], sort=False):
            where = dict(zip(ATOM_KEYS, keys), role="main")
            saes.append(main_sae(study, tables, where, part, tokens))
        survey += survey_saes(study, tables, name)
    commit = read_sidecar(study.paths.results / "replacement.csv").get("commit", "unknown")
    source = dict(profile=study.profile.name, commit=commit, window=study.profile.data.window)
    return dict(source=source, notes=notes, colours=CONDITION, vocabulary=vocabulary, saes=saes + survey)


# The page


def embedded(data: dict) -> str:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def render(data: dict) -> bytes:
    """Return the page in UTF-8, whose security policy allows only its own script and no loading."""
    template = TEMPLATE.read_text(encoding="utf-8")
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = template.replace("SCRIPT_HASH", f"sha256-{digest}", 1).replace("PAGE_DATA", embedded(data), 1)
    return text.encode("utf-8", "replace")


def page(data: dict) -> bytes:
    """Return the page, without the survey if it is too large. Raises ValueError if it is still too large."""
    content = render(data)
    if len(content) > MAXIMUM_BYTES:
        size = f"{len(content) / 1e6:.1f} MB"
        note = f"The cells of the survey are left out: with them the page would have {size}."
        kept = [sae for sae in data["saes"] if sae["role"] == "main"]
        content = render(data | dict(saes=kept, notes=[*data["notes"], note]))
        if len(content) > MAXIMUM_BYTES:
            size = f"{len(content):,} bytes, more than {MAXIMUM_BYTES:,}"
            raise ValueError(f"The page would have {size}: give the profile fewer cells.")
    return content


def write(study: Study, data: dict | None = None) -> Path:
    """Write figures/<profile>/atoms.html and return its path. data: of `collect`. Raises as `page`."""
    content, path = page(data or collect(study)), study.paths.figures / "atoms.html"
    write_atomically(path, lambda partial: partial.write_bytes(content))
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--profile", default="mini", help="a file in profiles/ (default: %(default)s)")
    parser.add_argument("--neuronpedia", metavar="FOLDER", help="write the main SAEs in Neuronpedia's form, too")


def main(options: argparse.Namespace) -> int:
    try:
        study = open_study(options.profile)
        data = collect(study)
        path = write(study, data)
    except FileNotFoundError as error:
        remedy = f"`make 02_train_saes PROFILE={options.profile}` makes the SAEs"
        raise CommandError(f"a file is missing ({error}): {remedy}.") from error
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")
    if options.neuronpedia:
        exported = neuronpedia.write(data, local_path(options.neuronpedia))
        print(f"{options.neuronpedia}: {len(exported)} SAEs in Neuronpedia's form")
    return 0
