"""Test a published SAE: the replacement test of page 05, beside the rows of the author's own test.

The SAE is one of the author's (a .pt file, or a folder or Hub folder with best.pt) or of this project
(config.json and model.safetensors). The host is one of the profile, a folder or a Hub id. Protocol: of the
profile's held-out windows, the first quarter fits the threshold of a BatchTopK SAE; on the others, equally
many firings per atom are drawn, and each atom replaces the native write at both amplitudes and both read
scopes. Results are in results/audits/NAME: replacement.csv, a row per firing, and replacement_summary.csv,
with the author's rows too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import pandas as pd

from replication import statistics as stats
from replication.commands import CommandError, positive
from replication.pages.own_model import draw
from replication.study import paths
from replication.study.lock import writing
from replication.study.study import Study, folder_or_id, open_study, split_windows
from writesae.edit import SCOPES
from writesae.evaluate.firings import find_firings
from writesae.evaluate.replacement import STEPS, replace_writes
from writesae.files import file_hash
from writesae.harvesting import harvest
from writesae.hosts.base import Host
from writesae.hosts.hub import fetch
from writesae.hosts.load import load_host
from writesae.sae.model import CONFIG, SAE, WEIGHTS
from writesae.sae.published import load_authors_sae, read_authors_file, read_authors_firings
from writesae.text import Windows

AUTHORS_FILE = "best.pt"
FIELDS = ("layer", "head", "k", "seed")  # that an older file of the author may lack


def located(name: str) -> Path:
    """Return the author's file or the folder of an SAE: a path, or a folder of the Hub, owner/name/folder.

    Raises CommandError for a place without an SAE, and as `writesae.hosts.hub.fetch`."""
    place, parts = paths.typed(name), name.split("/")
    if not place.exists():
        folder = "/".join(parts[2:])
        patterns = [f"{folder}/{file}" if folder else file for file in (AUTHORS_FILE, CONFIG, WEIGHTS)]
        place = fetch("/".join(parts[:2]), patterns) / folder
    if place.is_file() or (place / WEIGHTS).is_file():
        return place
    if not (place / AUTHORS_FILE).is_file():
        raise CommandError(f"{name} is no SAE: it holds neither {AUTHORS_FILE} nor {CONFIG} and {WEIGHTS}.")
    return place / AUTHORS_FILE


def load(place: Path, host: Host, fitting: Windows, transposed: bool, given: dict) -> SAE:
    """Return the SAE; fitting: windows for a threshold. Raises as the readers, and for another host's SAE."""
    if place.is_dir():
        sae = SAE.load(place)
    else:
        cell = {name: given.get(name, read_authors_file(place)[1].get(name)) for name in ("layer", "head")}
        if None in cell.values():
            raise CommandError(f"{place} does not say its cell: pass --layer and --head.")
        host.check_cell(**cell)
        states = harvest(host, fitting, **cell, progress=False).history("state")
        sae = load_authors_sae(place, host.name, transposed=transposed, heldout=states, **given)
    if (sae.d_k, sae.d_v) != (host.d_k, host.d_v):
        shapes = f"{sae.d_k} x {sae.d_v} matrices, and {host.name} has {host.d_k} x {host.d_v}"
        raise CommandError(f"{place} is an SAE of {shapes}: name the model that it was trained on.")
    return sae


def test(study: Study, host: Host, windows: Windows, sae: SAE, count: int) -> pd.DataFrame:
    """Return the replacement test of at most `count` firings, equally many per atom."""
    data, seed = study.profile.data, study.profile.seed
    factors = harvest(
        host, windows, layer=sae.config.layer, head=sae.config.head, batch=data.batch_windows, progress=False
    )
    last = windows.tokens.shape[1] - STEPS
    firings = find_firings(sae, factors, windows, first=data.first_position, last=last)
    options = dict(scopes=SCOPES, seed=seed, batch=data.batch_windows)
    return replace_writes(host, windows, sae, draw(firings, count, seed), **options)


def summarise(ours: pd.DataFrame, authors: pd.DataFrame | None, resamples: int, seed: int) -> pd.DataFrame:
    """Return per source, amplitude and read scope: n, the win rate, and median KLs in nats.

    ci: Wilson's interval; boot: a bootstrap by atom. The author's file does not say its read scope."""
    tables = [ours.assign(source="this project")]
    if authors is not None:
        tables.append(authors.assign(source="author", read="not said"))

    def row(part: pd.DataFrame) -> dict:
        win = stats.beats(part)
        numbers = dict(n=len(part), n_atoms=part.atom.nunique())
        numbers |= stats.rate_row(win, resamples, seed, boot=part.atom)
        numbers |= {name: part[name].median() for name in ("kl_atom", "kl_delete", "kl_random")}
        return numbers | dict(strict_chain=(win & stats.beats(part, "delete", "random")).mean())

    both = pd.concat(tables, ignore_index=True)
    return stats.per_group(both, ["source", "layer", "head", "amplitude", "read"], row)


def shown(summary: pd.DataFrame) -> str:
    """Return the summary as text: shares in percent, KLs in millinats."""
    ends = (100 * summary[["win_rate", "boot_low", "boot_high"]]).itertuples(index=False)
    rate = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in ends]
    table = summary[["source", "amplitude", "read", "n"]].assign(**{"atom beats deletion (%)": rate})
    kls = {f"KL {name}": (1000 * summary[f"kl_{name}"]).round(3) for name in ("atom", "delete", "random")}
    return table.assign(**kls).to_string(index=False)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sae", required=True, help="a .pt file, a folder, or owner/name/folder of the Hub")
    parser.add_argument("--host", required=True, help="a host of the profile, a folder or a Hub id")
    parser.add_argument("--profile", default="mini", help="a file in profiles/, for the text (default: %(default)s)")
    parser.add_argument("--records", help="a JSON file of the author's substitution test on this SAE")
    parser.add_argument("--count", type=positive, default=1500, help="firings to test (default: %(default)s)")
    parser.add_argument("--transposed", action="store_true", help="the file's states are [d_v, d_k] (Mamba-2)")
    for name in FIELDS:
        parser.add_argument(f"--{name}", type=int, help="for a file of the author that does not say it")


def main(options: argparse.Namespace) -> int:
    study, given = open_study(options.profile, lock=False), vars(options)
    known = options.host in study.profile.hosts
    host = study.host(options.host) if known else load_host(folder_or_id(options.host), study.device)
    place, data = located(options.sae), study.profile.data
    windows = split_windows(host, "heldout", data.window, data.firing_windows, study.profile.corpus)
    quarter = len(windows) // 4
    fields = {name: given[name] for name in FIELDS if given[name] is not None}
    sae = load(place, host, windows[:quarter], options.transposed, fields)
    origin = dict(sae=options.sae, sae_sha256=file_hash(place / WEIGHTS if place.is_dir() else place))
    origin |= dict(model=options.host, count=options.count, transposed=options.transposed)
    digest = hashlib.sha256(json.dumps(origin | dict(profile=options.profile)).encode()).hexdigest()[:8]
    cell = f"L{sae.config.layer}-H{sae.config.head}"
    study.paths = paths.Paths(f"audits/{host.name.replace('/', '_')}-{cell}-{digest}")
    if sae.config.activation == "batch_topk":
        origin["threshold"] = float(sae.activation.threshold)
        fitted = "from the file" if place.is_dir() else f"fitted on {quarter} held-out windows"
        print(f"The SAE has BatchTopK's threshold {origin['threshold']:.4g}, {fitted}.")
    with writing(study.paths):
        table = test(study, host, windows[quarter:], sae, options.count)
        table = study.write("replacement", table, host.name, **origin)
        authors = read_authors_firings(options.records) if options.records else None
        summary = summarise(table, authors, study.profile.replacement.bootstrap, study.profile.seed)
        summary = study.write("replacement_summary", summary, host.name, **origin)
    print(shown(summary))
    print(f"KLs are medians in millinats; intervals resample atoms. {paths.shortened(study.paths.results)}")
    return 0
