"""Edits of a running cell's state, beside replacement and install: five small experiments on one cell of each host.

| table          | what is edited                                                          | the paper          |
|----------------|-------------------------------------------------------------------------|--------------------|
| cache_erase    | one write at an atom's firings taken out; the atom added elsewhere      | Sec. 4, App. I.4   |
| single_write   | one write chosen for a target token: does its logit move as predicted?  | Sec. 4, App. I.5   |
| newlines       | atoms that are active where lines end, amplified during generation      | Sec. 4, Table 4    |
| readers        | an exemplar atom added at its firings: which later heads change?        | App. E, I.2        |
| register_erase | every register firing of a passage at once                              | Sec. 3.2, Fig. 2b  |

Atoms, preferred tokens and the atoms of line ends are chosen on text of the SAE split or by a seeded draw, and
everything is measured on held-out text. All edits are exact (`writesae.edit`).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd
import torch

from replication.pages.cache_edits.erase import draw_places, erase, summarise_erase, token_drops
from replication.pages.cache_edits.newlines import (
    PER,
    amplifier,
    boundary_means,
    choose_boundary,
    conditions,
    generate_amplified,
    summarise_newlines,
    surface,
)
from replication.pages.cache_edits.readers import readers, summarise_readers, top_readers
from replication.pages.cache_edits.registers import erase_registers, summarise_registers
from replication.pages.cache_edits.single_write import single_writes, summarise_single
from replication.pages.cache_edits.site import Site, in_batches
from replication.study.profile import Section
from replication.study.study import Suite
from writesae.evaluate.firings import Encoded, all_firings, draw_atoms, encode
from writesae.evaluate.install import draw_targets
from writesae.evaluate.replacement import STEPS
from writesae.evaluate.shifts import draw_positions
from writesae.harvesting import harvest
from writesae.hosts.base import Host
from writesae.sae.model import SAE
from writesae.text import Windows

MODES = dict(offset="state", scale="write")  # how generation is amplified -> what the SAE of the atoms is trained on
GROUP = 20  # prompts run together
PASSAGES = 4  # passages run together, as they are read whole


@dataclass
class Found:
    """Windows of a split, a cell's SAE, what is active in them, and all firings."""

    windows: Windows
    sae: SAE
    encoded: Encoded
    firings: pd.DataFrame


FINDING = threading.RLock()  # groups that run at once share what one of them has found


@lru_cache(maxsize=2)
def _harvest(suite: Suite, name: str, cell: tuple[int, int], split: str, count: int) -> tuple[Windows, dict]:
    windows = suite.windows(name, split)[slice(0, count)]
    return windows, harvest(suite.host(name), windows.tokens, [cell], suite.profile.data.batch_windows)[cell]


def find(suite: Suite, name: str, cell: tuple[int, int], split: str, count: int, target: str) -> Found:
    """The firings of a cell's SAE in the first `count` windows of a split, kept for the next who asks."""
    with FINDING:
        return _find(suite, name, cell, split, count, target)


@lru_cache(maxsize=4)
def _find(suite: Suite, name: str, cell: tuple[int, int], split: str, count: int, target: str) -> Found:
    windows, factors = _harvest(suite, name, cell, split, count)
    sae, data = suite.sae(name, *cell, target), suite.profile.data
    encoded = encode(sae, factors.history(target, suite.profile.saes.write))
    last = windows.tokens.shape[1] - STEPS
    return Found(windows, sae, encoded, all_firings(encoded, windows.passage, data.first_position, last))


@lru_cache(maxsize=2)
def line_breaks(host: Host) -> torch.Tensor:
    """[V]: how many line breaks each token holds."""
    return torch.tensor([host.tokenizer.decode([i]).count("\n") for i in range(host.vocabulary)])


class Stages:
    """The stages of one host; each gives its part of a table, computed only where something has changed."""

    def __init__(self, suite: Suite, name: str, settings: Section):
        self.suite, self.name, self.settings, self.profile = suite, name, settings, suite.profile
        self.cell, self.seed = suite.cell(name, settings.place), suite.profile.seed

    @property
    def host(self) -> Host:
        return self.suite.host(self.name)

    def site(self, tokens: torch.Tensor) -> Site:
        return Site(self.host, self.host.run(tokens), *self.cell, self.profile.saes.write)

    def staged(self, table: str, groups, compute, **more) -> pd.DataFrame:
        """compute(group) for every group, with where it was found; `more` is what it depends on beside the settings."""
        inputs = dict(settings=self.settings, data=self.profile.data, cell=self.cell, write=self.profile.saes.write)
        inputs |= dict(seed=self.seed, saes=self.suite.sae_files(self.name), **more)
        where = dict(host=self.name, layer=self.cell[0], head=self.cell[1])
        groups = list(groups)
        return self.suite.staged(table, self.name, groups, lambda g: compute(g).assign(**where), [__name__], inputs)

    def selection(self, target: str) -> Found:
        """Text of the SAE split, on which things are chosen."""
        return find(self.suite, self.name, self.cell, "sae", self.settings.selection_windows, target)

    def heldout(self, target: str) -> Found:
        """The held-out text on which everything but generation is measured."""
        return find(self.suite, self.name, self.cell, "heldout", self.settings.windows, target)

    def alive(self, target: str) -> pd.DataFrame:
        """The cell's lines of alive_atoms.csv (notebook 07), which has the classes. ValueError where there are none."""
        table = self.suite.table("alive_atoms")
        where = dict(host=self.name, target=target, layer=self.cell[0], head=self.cell[1])
        here = np.logical_and.reduce([table[name] == value for name, value in where.items()])
        if not here.any():
            raise ValueError(f"alive_atoms.csv has no atoms of {where}: cache_edits.place must be population.place.")
        return table[here]

    def prompts(self, count: int, tokens: int) -> Windows:
        """The beginnings of `count` held-out passages, drawn at random. ValueError where there are fewer, or shorter ones."""
        windows = self.suite.windows(self.name, "heldout")
        first = np.unique(windows.passage.numpy(), return_index=True)[1]
        if len(first) < count:
            raise ValueError(
                f"{count} prompts are asked for and the held-out windows are of {len(first)} passages: "
                "ask for fewer prompts, or raise data.heldout_windows in the profile."
            )
        picked = np.sort(np.random.default_rng(self.seed).choice(first, count, replace=False))
        return windows[picked].beginnings(tokens)

    @cached_property
    def erased(self) -> tuple[np.ndarray, pd.DataFrame]:
        """The atoms of experiment 1 and their places: atoms that fire often enough in held-out text, and in the SAE's."""
        settings, own = self.settings.erase, self.heldout(self.settings.target)
        able = own.firings[own.firings.atom.isin(self.selection(self.settings.target).firings.atom)]
        atoms = draw_atoms(able, settings.atoms, settings.positions, self.seed)
        return atoms, draw_places(own.firings, own.encoded, atoms, settings.positions, self.seed)

    def preferred(self) -> pd.DataFrame:
        """cache_preferred: each atom's preferred token, found on firings in the SAE's text (other), and, as in the paper, on
        the tested firings themselves (same)."""
        target, count, batch = self.settings.target, self.settings.erase.positions, self.profile.data.batch_windows

        def compute(source: str) -> pd.DataFrame:
            (atoms, drawn), text = self.erased, self.heldout(target)
            firings = drawn[drawn["where"] == "firing"]
            if source == "other":
                text = self.selection(target)
                firings = text.firings[text.firings.atom.isin(atoms)].groupby("atom").head(count)
            parts = in_batches(firings, batch)
            falls = [token_drops(self.site(text.windows.tokens[i : i + batch]), part, atoms) for i, part in parts]
            score, token = sum(falls).max(1)
            said = [repr(self.host.tokenizer.decode([t])) for t in token.tolist()]
            counts = firings.groupby("atom").size().loc[atoms].to_numpy()
            columns = dict(atom=atoms, token=token.numpy(), text=said, score=score.numpy(), firings=counts)
            return pd.DataFrame(columns).assign(target=target, token_from=source)

        return self.staged("cache_preferred", ("other", "same"), compute)

    def erase(self) -> pd.DataFrame:
        """cache_erase (experiment 1)."""
        tokens, size = self.preferred(), self.profile.data.batch_windows
        preferred = {s: dict(zip(p.atom, p.token, strict=True)) for s, p in tokens.groupby("token_from")}

        def compute(start: int) -> pd.DataFrame:
            own, (_, drawn), doses = self.heldout(self.settings.target), self.erased, self.settings.erase.doses
            here = drawn[(drawn.window >= start) & (drawn.window < start + size)]
            if here.empty:
                return pd.DataFrame()
            site, here = self.site(own.windows.tokens[start : start + size]), here.assign(row=here.window - start)
            found = erase(site, own.sae, here, preferred, own.encoded.alive(), doses, self.seed + start)
            return found.assign(target=self.settings.target)

        said = tokens[["token_from", "atom", "token"]].values.tolist()
        return self.staged("cache_erase", range(0, self.settings.windows, size), compute, preferred=said)

    def single(self) -> pd.DataFrame:
        """single_write (experiment 2); targets as in notebook 10, by their native rank where they are read."""
        settings, install = self.settings.single, self.profile.section("install", self.name)
        windows = self.prompts(settings.prompts, settings.prompt_tokens)
        first, last = self.profile.data.first_position, settings.prompt_tokens - settings.horizon
        drawn = draw_positions(settings.prompts * settings.positions, first, last, self.seed)
        drawn = drawn.view(settings.prompts, settings.positions)

        def compute(start: int) -> pd.DataFrame:
            here = slice(start, start + GROUP)
            part, t0, site = windows[here], drawn[here].flatten(), self.site(windows.tokens[here])
            rows = torch.arange(len(part)).repeat_interleave(settings.positions)
            native = site.logits(rows, t0 + settings.horizon)
            targets, labels = draw_targets(native, install, self.seed + start)
            table = single_writes(site, rows, t0, targets, settings.magnitude, settings.horizon)
            row = rows.numpy()[table.pop("place")]
            table["target_class"] = np.tile(labels, len(table) // len(labels))
            return table.assign(prompt=row + start, passage=part.passage.numpy()[row])

        return self.staged("single_write", range(0, settings.prompts, GROUP), compute, install=install)

    def boundary_atoms(self) -> pd.DataFrame:
        """newline_atoms: the atoms of line ends, and random ones, for every mode."""
        modes = [mode for mode, target in MODES.items() if target in self.profile.saes.targets]

        def compute(mode: str) -> pd.DataFrame:
            text, first = self.selection(MODES[mode]), self.profile.data.first_position
            ends = line_breaks(self.host)[text.windows.tokens[:, first:]] > 0
            after = Encoded(text.encoded.indices[:, first:], text.encoded.coefficients[:, first:])
            means = boundary_means(after, ends, text.sae.n_atoms)
            return choose_boundary(means, self.settings.newlines.atoms, self.seed).assign(mode=mode, target=MODES[mode])

        return self.staged("newline_atoms", modes, compute)

    def newlines(self) -> pd.DataFrame:
        """newlines (experiment 3)."""
        settings, chosen = self.settings.newlines, self.boundary_atoms()
        windows, atoms = self.prompts(settings.prompts, settings.prompt_tokens), dict(list(chosen.groupby("mode")))
        wanted = conditions([mode for mode in MODES if mode in atoms], settings.doses)

        def compute(start: int) -> pd.DataFrame:
            part = windows[slice(start, start + GROUP)]
            saes = {mode: self.suite.sae(self.name, *self.cell, MODES[mode]) for mode in atoms}
            plan, site = amplifier(saes, atoms, wanted, len(part)), self.site(part.tokens)
            made, _ = generate_amplified(site, plan, settings.new_tokens, settings.temperature, self.seed + start)
            table = pd.DataFrame([wanted[i // len(part)] for i in range(len(made))], columns=["mode", "role", "dose"])
            table = table.assign(prompt=plan.prompt.numpy() + start, passage=part.passage[plan.prompt].numpy())
            table["newlines"] = line_breaks(self.host)[made].sum(1).numpy() * PER / settings.new_tokens
            table["distinct"] = [len(set(row)) / len(row) for row in made.tolist()]
            texts = [surface(self.host.tokenizer.decode(row)) for row in made.tolist()]
            return pd.concat([table, pd.DataFrame(texts)], axis=1)

        said = chosen[["mode", "role", "atom"]].values.tolist()
        return self.staged("newlines", range(0, settings.prompts, GROUP), compute, atoms=said)

    def exemplars(self) -> pd.DataFrame:
        """The register atoms that fire most, of those that fire in enough passages; bundles where registers are too few."""
        settings, alive = self.settings.readers, self.alive(self.settings.target)
        able = alive[alive.passages >= settings.fewest_passages].assign(register=alive["class"] == "register")
        return able.sort_values(["register", "firings"], ascending=False, kind="stable").head(settings.exemplars)

    def readers(self) -> pd.DataFrame:
        """readers (experiment 4); a context a passage."""
        settings, chosen = self.settings.readers, self.exemplars()
        classes = dict(zip(chosen.atom.tolist(), chosen["class"], strict=True))

        def compute(atom: int) -> pd.DataFrame:
            own = self.heldout(self.settings.target)
            last = own.windows.tokens.shape[1] - settings.steps
            firings = own.firings[(own.firings.atom == atom) & (own.firings.position <= last)]
            firings = firings.sample(frac=1.0, random_state=self.seed).drop_duplicates("passage")
            firings = firings.head(settings.contexts).reset_index(drop=True)
            site, sides = self.site(own.windows.tokens[firings.window.to_numpy()]), [x[atom] for x in own.sae.atoms()]
            firings = firings.assign(row=firings.index)
            table = readers(site, sides, firings, settings.steps, settings.random_writes, self.seed + atom)
            return table.assign(**{"target": self.settings.target, "class": classes[atom]})

        return self.staged("readers", classes, compute, classes=sorted(classes.items()))

    def registers(self) -> pd.DataFrame:
        """register_erase (experiment 5): up to `passages` passages that have a register firing, one window of each."""
        known = {target: self.alive(target) for target in self.profile.saes.targets}
        known = {t: sorted(a.atom[a["class"] == "register"].tolist()) for t, a in known.items()}

        def compute(target: str) -> pd.DataFrame:
            own, tables = self.heldout(target), []
            firings = own.firings[own.firings.atom.isin(known[target])]
            windows = firings.sample(frac=1.0, random_state=self.seed).drop_duplicates("passage").window
            windows = np.sort(windows.to_numpy()[: self.settings.passages])
            for start in range(0, len(windows), PASSAGES):
                here = windows[start : start + PASSAGES]
                part = firings[firings.window.isin(here)]
                part, site = part.assign(row=np.searchsorted(here, part.window)), self.site(own.windows.tokens[here])
                first = self.profile.data.first_position
                tables.append(erase_registers(site, part, own.sae, first, self.seed + start))
            return pd.concat(tables, ignore_index=True).assign(target=target)

        return self.staged("register_erase", known, compute, registers=known)


STAGES = dict(
    cache_preferred=Stages.preferred,
    cache_erase=Stages.erase,
    single_write=Stages.single,
    newline_atoms=Stages.boundary_atoms,
    newlines=Stages.newlines,
    readers=Stages.readers,
    register_erase=Stages.registers,
)
SUMMARIES = dict(
    cache_erase=summarise_erase,
    single_write=summarise_single,
    newlines=summarise_newlines,
    readers=summarise_readers,
    register_erase=summarise_registers,
)


def run(suite: Suite) -> dict[str, pd.DataFrame]:
    """The tables of all hosts, results NAME.csv for every name in STAGES."""
    parts = {table: [] for table in STAGES}
    for name in suite.profile.hosts:  # host by host, for the stages of one share its harvests
        host = Stages(suite, name, suite.profile.section("cache_edits", name))
        for table, stage in STAGES.items():
            parts[table].append(stage(host))
    return {table: suite.gather(table, part) for table, part in parts.items()}


def tables(suite: Suite, made: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """results NAME_summary.csv for every name in SUMMARIES, and top_readers.csv."""
    seed = suite.profile.seed
    summaries = {f"{name}_summary": summarise(made[name], seed) for name, summarise in SUMMARIES.items()}
    summaries["top_readers"] = top_readers(made["readers"], seed)
    return {name: suite.write(name, table) for name, table in summaries.items()}
