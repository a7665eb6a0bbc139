"""Edits of a running cell's state, besides replacement and install: five small experiments on one cell per
host.

| table          | what is edited                                                      | the paper         |
|----------------|---------------------------------------------------------------------|-------------------|
| cache_erase    | one write at an atom's firings taken out; the atom added elsewhere  | Sec. 4, App. I.4  |
| single_write   | one write chosen for a target token, whose logit should move        | Sec. 4, App. I.5  |
| newlines       | atoms that are active where lines end, amplified during generation  | Sec. 4, Table 4   |
| readers        | an exemplar atom added at its firings: which later heads change?    | App. E, I.2       |
| register_erase | every register firing of a passage at once                          | Sec. 3.2, Fig. 2b |

Atoms, preferred tokens and the atoms of line ends are chosen on text of the SAE split or by a seeded draw,
and everything is measured on held-out text. All edits are exact (`writesae.edit`).
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

from replication.pages.cache_edits import newlines as amplifying
from replication.pages.cache_edits.erase import draw_places, erase, summarise_erase, token_drops
from replication.pages.cache_edits.readers import readers, summarise_readers, top_readers
from replication.pages.cache_edits.registers import erase_registers, summarise_registers
from replication.pages.cache_edits.single_write import single_writes, summarise_single
from replication.pages.cache_edits.site import Site
from replication.study.firings import encoded_saes, firings_of, passage_prompts
from replication.study.profile import Section
from replication.study.stages import rows_with
from replication.study.study import Suite
from writesae.evaluate.firings import CellSAE, draw_atoms
from writesae.evaluate.install import draw_targets
from writesae.evaluate.shifts import draw_positions
from writesae.hosts.base import Host
from writesae.sae.sparsity import Active
from writesae.text import Windows

MODES = dict(offset="state", scale="write")  # how generation is amplified -> target of the SAE
GROUP = 20  # prompts run together
PASSAGES = 4  # passages run together; each is read whole


class Text(NamedTuple):
    """Windows of a split, an SAE of the cell on them, and all its firings there."""

    windows: Windows
    cell_sae: CellSAE
    firings: pd.DataFrame


@lru_cache(maxsize=2)
def line_breaks(host: Host) -> torch.Tensor:
    """Return [V]: the number of line breaks in each token."""
    return torch.tensor([host.tokenizer.decode([i]).count("\n") for i in range(host.vocabulary)])


class Stages:
    """The stages of one host. Each returns its part of a table, and computes only what has changed."""

    def __init__(self, suite: Suite, name: str, settings: Section):
        self.suite, self.name, self.settings, self.profile = suite, name, settings, suite.profile
        self.cell, self.seed = suite.cell(name, settings.place), suite.profile.seed

    @property
    def host(self) -> Host:
        return self.suite.host(self.name)

    def site(self, windows: Windows, numbers: np.ndarray | None = None) -> Site:
        """Return the cell in a native run over windows, or over some of them by number."""
        tokens = windows.tokens if numbers is None else windows.tokens[numbers]
        return Site(self.host, self.host.run(tokens), *self.cell, self.profile.saes.write, numbers)

    def batch(self, windows: Windows, start: int) -> Site:
        """Return the cell in a native run over the batch of windows from `start` on."""
        return self.site(windows, np.arange(start, min(start + self.profile.data.batch_windows, len(windows))))

    def staged(self, table: str, groups, compute, **more) -> pd.DataFrame:
        """Return compute(group) for every group, with the cell. `more`: what it depends on beside the
        settings."""
        inputs = dict(settings=self.settings, data=self.profile.data, cell=self.cell, write=self.profile.saes.write)
        inputs |= dict(seed=self.seed, saes=self.suite.sae_files(self.name), **more)
        where = dict(host=self.name, layer=self.cell[0], head=self.cell[1])
        groups = list(groups)
        return self.suite.staged(table, self.name, groups, lambda g: compute(g).assign(**where), [__name__], inputs)

    def texts(self, split: str, count: int) -> dict[str, Text]:
        """Return the first windows of a split by target of the SAE on them."""
        windows = self.suite.windows(self.name, split)[slice(0, count)]
        saes = encoded_saes(self.suite, self.name, [self.cell], "main", windows)
        return {x.target: Text(windows, x, firings_of(self.suite, x, windows)) for x in saes}

    @cached_property
    def selection(self) -> dict[str, Text]:
        """Text of the SAE split, on which atoms and tokens are chosen."""
        return self.texts("sae", self.settings.selection_windows)

    @cached_property
    def heldout(self) -> dict[str, Text]:
        """The held-out text on which everything but generation is measured."""
        return self.texts("heldout", self.settings.windows)

    def alive(self, target: str) -> pd.DataFrame:
        """Return the cell's rows of alive_atoms.csv (notebook 07), which has the classes. ValueError for
        none."""
        table = self.suite.table("alive_atoms")
        where = dict(host=self.name, target=target, layer=self.cell[0], head=self.cell[1])
        rows = rows_with(table, **where)
        if rows.empty:
            raise ValueError(f"alive_atoms.csv has no atoms of {where}: cache_edits.place must be population.place.")
        return rows

    @cached_property
    def erased(self) -> tuple[np.ndarray, pd.DataFrame]:
        """The atoms of experiment 1 and their places: atoms that fire often enough in both texts."""
        settings, text = self.settings.erase, self.heldout[self.settings.target]
        able = text.firings[text.firings.atom.isin(self.selection[self.settings.target].firings.atom)]
        atoms = draw_atoms(able, settings.atoms, settings.positions, self.seed)
        return atoms, draw_places(text.firings, text.cell_sae, atoms, settings.positions, self.seed)

    def preferred(self) -> pd.DataFrame:
        """cache_preferred: each atom's preferred token, found on firings in the SAE's text (other), and, as
        in the paper, on the tested firings themselves (same)."""
        target, count, size = self.settings.target, self.settings.erase.positions, self.profile.data.batch_windows

        def compute(source: str) -> pd.DataFrame:
            (atoms, drawn), text = self.erased, self.heldout[target]
            firings = drawn[drawn["where"] == "firing"]
            if source == "other":
                text = self.selection[target]
                firings = text.firings[text.firings.atom.isin(atoms)].groupby("atom").head(count)
            batches = firings.groupby(firings.window // size)
            falls = [token_drops(self.batch(text.windows, n * size), part, atoms) for n, part in batches]
            score, token = sum(falls).max(1)
            texts = [repr(self.host.tokenizer.decode([t])) for t in token.tolist()]
            counts = firings.groupby("atom").size().loc[atoms].to_numpy()
            columns = dict(atom=atoms, token=token.numpy(), text=texts, score=score.numpy(), firings=counts)
            return pd.DataFrame(columns).assign(target=target, token_from=source)

        return self.staged("cache_preferred", ("other", "same"), compute)

    def erase(self) -> pd.DataFrame:
        """cache_erase (experiment 1)."""
        tokens, size = self.preferred(), self.profile.data.batch_windows
        preferred = {s: dict(zip(p.atom, p.token, strict=True)) for s, p in tokens.groupby("token_from")}

        def compute(start: int) -> pd.DataFrame:
            (windows, cell_sae, _), (_, drawn) = self.heldout[self.settings.target], self.erased
            part = drawn[(drawn.window >= start) & (drawn.window < start + size)]
            if part.empty:
                return pd.DataFrame()
            doses, site = self.settings.erase.doses, self.batch(windows, start)
            table = erase(site, cell_sae.sae, part, preferred, cell_sae.alive, doses, self.seed + start)
            return table.assign(target=self.settings.target)

        chosen = tokens[["token_from", "atom", "token"]].values.tolist()
        return self.staged("cache_erase", range(0, self.settings.windows, size), compute, preferred=chosen)

    def single(self) -> pd.DataFrame:
        """single_write (experiment 2); targets as in notebook 10, by their native rank when they are read."""
        settings, install = self.settings.single, self.profile.section("install", self.name)
        windows = passage_prompts(self.suite, self.name, settings.prompts, settings.prompt_tokens)
        first, last = self.profile.data.first_position, settings.prompt_tokens - settings.horizon
        drawn = draw_positions(settings.prompts * settings.positions, first, last, self.seed)
        drawn = drawn.view(settings.prompts, settings.positions)

        def compute(start: int) -> pd.DataFrame:
            group = slice(start, start + GROUP)
            part, t0, site = windows[group], drawn[group].flatten(), self.site(windows[group])
            rows = torch.arange(len(part)).repeat_interleave(settings.positions)
            native = site.logits(rows, t0 + settings.horizon)
            targets, labels = draw_targets(native, install.rank_classes, install.targets_per_class, self.seed + start)
            table = single_writes(site, rows, t0, targets, settings.magnitude, settings.horizon)
            row = rows.numpy()[table.pop("place")]
            table["target_class"] = np.tile(labels, len(table) // len(labels))
            return table.assign(prompt=row + start, passage=part.passage.numpy()[row])

        return self.staged("single_write", range(0, settings.prompts, GROUP), compute, install=install)

    def boundary_atoms(self) -> pd.DataFrame:
        """newline_atoms: the atoms of line ends, and random ones, for every mode."""
        modes = [mode for mode, target in MODES.items() if target in self.profile.saes.targets]

        def compute(mode: str) -> pd.DataFrame:
            (windows, cell_sae, _), first = self.selection[MODES[mode]], self.profile.data.first_position
            ends = line_breaks(self.host)[windows.tokens[:, first:]] > 0
            active = Active(cell_sae.indices[:, first:], cell_sae.coefficients[:, first:])
            means = amplifying.boundary_means(active, ends, cell_sae.sae.n_atoms)
            chosen = amplifying.choose_boundary(means, self.settings.newlines.atoms, self.seed)
            return chosen.assign(mode=mode, target=MODES[mode])

        return self.staged("newline_atoms", modes, compute)

    def newlines(self) -> pd.DataFrame:
        """newlines (experiment 3)."""
        settings, chosen = self.settings.newlines, self.boundary_atoms()
        windows = passage_prompts(self.suite, self.name, settings.prompts, settings.prompt_tokens)
        atoms = dict(list(chosen.groupby("mode")))
        wanted = amplifying.conditions([mode for mode in MODES if mode in atoms], settings.doses)

        def compute(start: int) -> pd.DataFrame:
            part = windows[slice(start, start + GROUP)]
            saes = {mode: self.suite.sae(self.name, *self.cell, MODES[mode]) for mode in atoms}
            plan, site = amplifying.amplifier(saes, atoms, wanted, len(part)), self.site(part)
            options = dict(temperature=settings.temperature, seed=self.seed + start)
            tokens, _ = amplifying.generate_amplified(site, plan, settings.new_tokens, **options)
            conditions = [wanted[i // len(part)] for i in range(len(tokens))]
            table = pd.DataFrame(conditions, columns=["mode", "role", "dose"])
            table = table.assign(prompt=plan.prompt.numpy() + start, passage=part.passage[plan.prompt].numpy())
            breaks = line_breaks(self.host)[tokens].sum(1).numpy()
            table["newlines"] = breaks * amplifying.PER / settings.new_tokens
            table["distinct"] = [len(set(row)) / len(row) for row in tokens.tolist()]
            texts = [amplifying.surface(self.host.tokenizer.decode(row)) for row in tokens.tolist()]
            return pd.concat([table, pd.DataFrame(texts)], axis=1)

        places = chosen[["mode", "role", "atom"]].values.tolist()
        return self.staged("newlines", range(0, settings.prompts, GROUP), compute, atoms=places)

    def exemplars(self) -> pd.DataFrame:
        """Return the register atoms with the most firings, in enough passages; then bundles, if there are too
        few."""
        settings, alive = self.settings.readers, self.alive(self.settings.target)
        able = alive[alive.passages >= settings.fewest_passages].assign(register=alive["class"] == "register")
        return able.sort_values(["register", "firings"], ascending=False, kind="stable").head(settings.exemplars)

    def readers(self) -> pd.DataFrame:
        """readers (experiment 4); one context per passage."""
        settings, chosen = self.settings.readers, self.exemplars()
        classes = dict(zip(chosen.atom.tolist(), chosen["class"], strict=True))

        def compute(atom: int) -> pd.DataFrame:
            windows, cell_sae, firings = self.heldout[self.settings.target]
            last = windows.tokens.shape[1] - settings.steps
            firings = firings[(firings.atom == atom) & (firings.position <= last)]
            firings = firings.sample(frac=1.0, random_state=self.seed).drop_duplicates("passage")
            firings = firings.head(settings.contexts).reset_index(drop=True)
            site, sides = self.site(windows, firings.window.to_numpy()), [x[atom] for x in cell_sae.sae.atoms()]
            table = readers(site, sides, firings, settings.steps, settings.random_writes, self.seed + atom)
            return table.assign(**{"target": self.settings.target, "class": classes[atom]})

        return self.staged("readers", classes, compute, classes=sorted(classes.items()))

    def registers(self) -> pd.DataFrame:
        """register_erase (experiment 5): up to `passages` passages with a register firing, one window of
        each."""
        alive = {target: self.alive(target) for target in self.profile.saes.targets}
        atoms = {t: sorted(a.atom[a["class"] == "register"].tolist()) for t, a in alive.items()}

        def compute(target: str) -> pd.DataFrame:
            (windows, cell_sae, firings), tables = self.heldout[target], []
            firings = firings[firings.atom.isin(atoms[target])]
            shuffled = firings.sample(frac=1.0, random_state=self.seed).drop_duplicates("passage")
            numbers = np.sort(shuffled.window.to_numpy()[: self.settings.passages])
            for start in range(0, len(numbers), PASSAGES):
                site = self.site(windows, numbers[start : start + PASSAGES])
                part, first = firings[firings.window.isin(site.windows)], self.profile.data.first_position
                tables.append(erase_registers(site, part, cell_sae.sae, first, self.seed + start))
            return pd.concat(tables, ignore_index=True).assign(target=target)

        return self.staged("register_erase", atoms, compute, registers=atoms)


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
    newlines=amplifying.summarise_newlines,
    readers=summarise_readers,
    register_erase=summarise_registers,
)


def run(suite: Suite) -> dict[str, pd.DataFrame]:
    """Return the tables of all hosts, results NAME.csv for every name in STAGES."""
    parts = {table: [] for table in STAGES}
    for name in suite.profile.hosts:  # host by host, so that its stages share the harvests
        stages = Stages(suite, name, suite.profile.section("cache_edits", name))
        for table, stage in STAGES.items():
            parts[table].append(stage(stages))
    return {table: suite.gather(table, part) for table, part in parts.items()}


def tables(suite: Suite, measured: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return results NAME_summary.csv for every name in SUMMARIES, and top_readers.csv."""
    seed = suite.profile.seed
    summaries = {f"{name}_summary": summarise(measured[name], seed) for name, summarise in SUMMARIES.items()}
    summaries["top_readers"] = top_readers(measured["readers"], seed)
    return {name: suite.write(name, table) for name, table in summaries.items()}
