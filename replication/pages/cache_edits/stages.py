"""Notebook 11: edits of a running cell's state besides replacement and install, on one cell per host.

| table          | what is edited                                                     | the paper         |
|----------------|--------------------------------------------------------------------|-------------------|
| cache_erase    | one write removed at an atom's firings; the atom added elsewhere   | Sec. 4, App. I.4  |
| single_write   | one write chosen for a target token, whose logit should move       | Sec. 4, App. I.5  |
| newlines       | atoms that are active at line ends, amplified during generation    | Sec. 4, Table 4   |
| readers        | an exemplar atom added at its firings: which later heads change?   | App. E, I.2       |
| register_erase | every register firing of a passage at once                         | Sec. 3.2, Fig. 2b |

Atoms and preferred tokens are chosen on text of the SAE split or by a seeded draw; everything is measured on
held-out text. All edits are exact (`writesae.edit`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import product
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
from replication.study.fingerprint import Later
from replication.study.firings import passage_prompts
from replication.study.profile import CacheEdits
from replication.study.stages import rows_with
from replication.study.study import Study
from writesae.evaluate.firings import CellSAE, all_firings, draw_atoms, encode_cell
from writesae.evaluate.install import draw_targets
from writesae.evaluate.replacement import STEPS
from writesae.evaluate.shifts import draw_positions
from writesae.harvesting import Cell, harvest
from writesae.hosts.base import Host
from writesae.sae.model import SAE
from writesae.sae.sparsity import Active
from writesae.text import Windows

MODES = dict(offset="state", scale="write", kept="state")  # how generation is amplified -> target of the SAEs
GROUP = 20  # prompts run together
PASSAGES = 4  # passages run together


class Text(NamedTuple):
    """Windows of a split, an SAE of the cell on them, and all its firings there."""

    windows: Windows
    cell_sae: CellSAE
    firings: pd.DataFrame


@lru_cache(maxsize=2)
def line_breaks(host: Host) -> torch.Tensor:
    """Return [V]: the number of line breaks in each token."""
    return torch.tensor([host.tokenizer.decode([i]).count("\n") for i in range(host.vocabulary)])


@dataclass
class Bench:
    """One cell of a host, with everything that the experiments on it depend on.

    settings: the profile's section; first: the first position of firings; batch: windows run together; saes:
    by target. selection, heldout: texts by target; atoms and tokens are chosen on the former, edits are
    measured on the latter."""

    host: Host
    cell: Cell
    write: str
    seed: int
    first: int
    batch: int
    settings: CacheEdits
    saes: dict[str, SAE]
    selection: Later
    heldout: Later

    def site(self, windows: Windows, numbers: np.ndarray | None = None) -> Site:
        """Return the cell in a native run over windows, or over some of them by number."""
        tokens = windows.tokens if numbers is None else windows.tokens[numbers]
        return Site(self.host, self.host.run(tokens), *self.cell, self.write, numbers)

    def part(self, windows: Windows, start: int) -> Site:
        """Return the cell in a native run over the batch of windows from `start` on."""
        return self.site(windows, np.arange(start, min(start + self.batch, len(windows))))

    def placed(self, table: pd.DataFrame, **columns) -> pd.DataFrame:
        """Return a table with further columns, and with the cell."""
        return table.assign(**columns, host=self.host.name, layer=self.cell[0], head=self.cell[1])


def make_bench(study: Study, name: str) -> Bench:
    """Return the bench of a host of a study."""
    profile, settings = study.profile, study.profile.section("cache_edits", name)
    cell, first, write = study.cell(name, settings.place), profile.data.first_position, profile.saes.write
    saes = {target: study.sae(name, *cell, target) for target in profile.saes.targets}
    given = dict(host=study.host(name), cell=cell, write=write, first=first, batch=profile.data.batch_windows)
    texts = [
        Later(_texts, windows=study.windows(name, split)[slice(0, count)], saes=saes, **given)
        for split, count in (("sae", settings.selection_windows), ("heldout", settings.windows))
    ]
    return Bench(**given, seed=profile.seed, settings=settings, saes=saes, selection=texts[0], heldout=texts[1])


def _texts(host: Host, windows: Windows, saes: dict, cell: Cell, write: str, first: int, batch: int) -> dict[str, Text]:
    factors, texts = harvest(host, windows.tokens, [cell], batch)[cell], {}
    for target, sae in saes.items():
        cell_sae = encode_cell(cell, target, write, sae, factors)
        firings = all_firings(cell_sae, windows.passage, first, windows.tokens.shape[1] - STEPS)
        texts[target] = Text(windows, cell_sae, firings)
    return texts


def erase_atoms(study: Study, bench: Bench) -> dict[str, pd.DataFrame]:
    """Return cache_preferred and cache_erase.

    An atom's preferred token comes from firings in the SAE's text (other), or from the tested ones (same; the
    paper)."""
    name, erased = bench.host.name, Later(_erased, bench=bench)
    tokens = study.stage("cache_preferred", name, ("other", "same"), _preferred, bench=bench, erased=erased)
    preferred = {s: dict(zip(p.atom, p.token, strict=True)) for s, p in tokens.groupby("token_from")}
    groups, given = range(0, bench.settings.windows, bench.batch), dict(erased=erased, preferred=preferred)
    table = study.stage("cache_erase", name, groups, _erase, bench=bench, **given)
    return dict(cache_preferred=tokens, cache_erase=table)


def _erased(bench: Bench) -> tuple[np.ndarray, pd.DataFrame]:
    """Return atoms that fire often enough in both texts, and their places."""
    settings, text = bench.settings.erase, bench.heldout()[bench.settings.target]
    able = text.firings[text.firings.atom.isin(bench.selection()[bench.settings.target].firings.atom)]
    atoms = draw_atoms(able, settings.atoms, settings.positions, bench.seed)
    return atoms, draw_places(text.firings, text.cell_sae, atoms, settings.positions, bench.seed)


def _preferred(source: str, bench: Bench, erased: Later) -> pd.DataFrame:
    target, (atoms, drawn) = bench.settings.target, erased()
    text, firings = bench.heldout()[target], drawn[drawn["where"] == "firing"]
    if source == "other":
        text = bench.selection()[target]
        firings = text.firings[text.firings.atom.isin(atoms)].groupby("atom").head(bench.settings.erase.positions)
    batches = firings.groupby(firings.window // bench.batch)
    drops = [token_drops(bench.part(text.windows, n * bench.batch), part, atoms) for n, part in batches]
    score, token = sum(drops).max(1)
    texts = [repr(bench.host.tokenizer.decode([t])) for t in token.tolist()]
    counts = firings.groupby("atom").size().loc[atoms].to_numpy()
    columns = dict(atom=atoms, token=token.numpy(), text=texts, score=score.numpy(), firings=counts)
    return bench.placed(pd.DataFrame(columns), target=target, token_from=source)


def _erase(start: int, bench: Bench, erased: Later, preferred: dict) -> pd.DataFrame:
    (windows, cell_sae, _), (_, drawn) = bench.heldout()[bench.settings.target], erased()
    part = drawn[(drawn.window >= start) & (drawn.window < start + bench.batch)]
    if part.empty:
        return bench.placed(pd.DataFrame())
    doses, site = bench.settings.erase.doses, bench.part(windows, start)
    table = erase(site, cell_sae.sae, part, preferred, cell_sae.alive, doses, bench.seed + start)
    return bench.placed(table, target=bench.settings.target)


def single(study: Study, bench: Bench) -> dict[str, pd.DataFrame]:
    """Return single_write; targets are drawn as in notebook 12, by their native rank where they are read."""
    settings, install = bench.settings.single, study.profile.section("install", bench.host.name)
    windows = passage_prompts(study, bench.host.name, settings.prompts, settings.prompt_tokens)
    last = settings.prompt_tokens - settings.horizon
    drawn = draw_positions(settings.prompts * settings.positions, bench.first, last, bench.seed)
    drawn, groups = drawn.view(settings.prompts, settings.positions), range(0, settings.prompts, GROUP)
    targets = dict(rank_classes=install.rank_classes, per_class=install.targets_per_class)
    given = dict(bench=bench, windows=windows, drawn=drawn, targets=targets)
    return dict(single_write=study.stage("single_write", bench.host.name, groups, _single, **given))


def _single(start: int, bench: Bench, windows: Windows, drawn: torch.Tensor, targets: dict) -> pd.DataFrame:
    settings, group = bench.settings.single, slice(start, start + GROUP)
    part, t0, site = windows[group], drawn[group].flatten(), bench.site(windows[group])
    rows = torch.arange(len(part)).repeat_interleave(settings.positions)
    native = site.logits(rows, t0 + settings.horizon)
    tokens, labels = draw_targets(native, **targets, seed=bench.seed + start)
    table = single_writes(site, rows, t0, tokens, settings.magnitude, settings.horizon)
    row = rows.numpy()[table.pop("place")]
    table["target_class"] = np.tile(labels, len(table) // len(labels))
    return bench.placed(table, prompt=row + start, passage=part.passage.numpy()[row])


def amplify(study: Study, bench: Bench) -> dict[str, pd.DataFrame]:
    """Return newline_atoms (atoms of line ends, and random ones, per mode and edited head) and newlines."""
    settings, name, saes = bench.settings.newlines, bench.host.name, edited_heads(study, bench)
    edited = [(mode, head) for mode, of_mode in saes.items() for head in of_mode]
    cells = sorted({(bench.cell[0], head) for _, head in edited})
    tokens = study.windows(name, "sae")[slice(0, bench.settings.selection_windows)].tokens
    factors = Later(harvest, host=bench.host, windows=tokens, cells=cells, batch=bench.batch)
    chosen = study.stage("newline_atoms", name, edited, _boundary, bench=bench, saes=saes, factors=factors)
    windows = passage_prompts(study, name, settings.prompts, settings.prompt_tokens)
    given = dict(bench=bench, windows=windows, atoms=dict(list(chosen.groupby("mode"))), saes=saes)
    starts, names = range(0, settings.prompts, GROUP), amplifying.generations(saes, settings.doses)
    table = study.stage("newlines", name, product(names, starts), _newlines, **given)
    return dict(newline_atoms=chosen, newlines=table)


def edited_heads(study: Study, bench: Bench) -> dict[str, dict[int, SAE]]:
    """Return {mode: {head of the cell's layer: SAE}} for the modes whose target the profile has.

    The cell has its own SAE. `kept` has the other heads too if the survey covers the layer."""
    (layer, head), name = bench.cell, bench.host.name
    saes = {mode: {head: bench.saes[target]} for mode, target in MODES.items() if target in bench.saes}
    if "kept" in saes and layer in study.survey_layers(name):
        others = [other for other in range(bench.host.heads) if other != head]
        saes["kept"] |= {other: study.sae(name, layer, other, MODES["kept"], "survey") for other in others}
    return saes


def _boundary(edited: tuple[str, int], bench: Bench, saes: dict, factors: Later) -> pd.DataFrame:
    mode, head = edited
    windows, cell_sae, _ = bench.selection()[MODES[mode]]
    if head != bench.cell[1]:
        cell = bench.cell[0], head
        cell_sae = encode_cell(cell, MODES[mode], bench.write, saes[mode][head], factors()[cell])
    ends = line_breaks(bench.host)[windows.tokens[:, bench.first :]] > 0
    active = Active(cell_sae.indices[:, bench.first :], cell_sae.coefficients[:, bench.first :])
    means = amplifying.boundary_means(active, ends, cell_sae.sae.n_atoms)
    chosen = amplifying.choose_boundary(means, bench.settings.newlines.atoms, bench.seed)
    return bench.placed(chosen, mode=mode, target=MODES[mode]).assign(head=head)


def _newlines(group: tuple[str, int], bench: Bench, windows: Windows, atoms: dict, saes: dict) -> pd.DataFrame:
    (name, start), settings = group, bench.settings.newlines
    part, wanted = windows[slice(start, start + GROUP)], amplifying.generations(saes, settings.doses)[name]
    if name == "kept":
        plan = amplifying.kept_offsets(saes[name], atoms[name], wanted, len(part), bench.host.heads)
    else:
        modes = [mode for mode in saes if mode in {mode for mode, _, _ in wanted}]
        of_cell = {mode: saes[mode][bench.cell[1]] for mode in modes}
        plan = amplifying.amplifier(of_cell, {mode: atoms[mode] for mode in modes}, wanted, len(part))
    options = dict(temperature=settings.temperature, seed=bench.seed + start)
    tokens, _, states = amplifying.generate_amplified(bench.site(part), plan, settings.new_tokens, **options)
    conditions = [wanted[i // len(part)] for i in range(len(tokens))]
    table = pd.DataFrame(conditions, columns=["mode", "role", "dose"])
    table = table.assign(prompt=plan.prompt.numpy() + start, passage=part.passage[plan.prompt].numpy())
    breaks = line_breaks(bench.host)[tokens].sum(1).numpy()
    table["newlines"] = breaks * amplifying.PER / settings.new_tokens
    table["distinct"] = [len(set(row)) / len(row) for row in tokens.tolist()]
    table["heads"] = [len(saes.get(mode, ())) for mode in table["mode"]]
    table["state_norm"] = states[:, bench.cell[1]].norm(dim=(-2, -1)).numpy()
    texts = [amplifying.surface(bench.host.tokenizer.decode(row)) for row in tokens.tolist()]
    return bench.placed(pd.concat([table, pd.DataFrame(texts)], axis=1))


def alive(study: Study, bench: Bench, target: str) -> pd.DataFrame:
    """Return the cell's rows in notebook 09's alive_atoms.csv. Raises ValueError if there are none."""
    where = dict(host=bench.host.name, target=target, layer=bench.cell[0], head=bench.cell[1])
    rows = rows_with(study.table("alive_atoms"), **where)
    if rows.empty:
        raise ValueError(f"alive_atoms.csv has no atoms of {where}: cache_edits.place must be population.place.")
    return rows


def read_atoms(study: Study, bench: Bench) -> dict[str, pd.DataFrame]:
    """Return readers of the most frequent registers in enough passages, and of bundles if too few."""
    settings, atoms = bench.settings.readers, alive(study, bench, bench.settings.target)
    able = atoms[atoms.passages >= settings.fewest_passages].assign(register=atoms["class"] == "register")
    chosen = able.sort_values(["register", "firings"], ascending=False, kind="stable").head(settings.exemplars)
    classes = dict(zip(chosen.atom.tolist(), chosen["class"], strict=True))
    return dict(readers=study.stage("readers", bench.host.name, classes, _readers, bench=bench, classes=classes))


def _readers(atom: int, bench: Bench, classes: dict[int, str]) -> pd.DataFrame:
    settings, (windows, cell_sae, firings) = bench.settings.readers, bench.heldout()[bench.settings.target]
    last = windows.tokens.shape[1] - settings.steps
    firings = firings[(firings.atom == atom) & (firings.position <= last)]
    firings = firings.sample(frac=1.0, random_state=bench.seed).drop_duplicates("passage")
    firings = firings.head(settings.contexts).reset_index(drop=True)
    site, sides = bench.site(windows, firings.window.to_numpy()), [x[atom] for x in cell_sae.sae.atoms()]
    table = readers(site, sides, firings, settings.steps, settings.random_writes, bench.seed + atom)
    return bench.placed(table, **{"target": bench.settings.target, "class": classes[atom]})


def erase_all(study: Study, bench: Bench) -> dict[str, pd.DataFrame]:
    """Return register_erase: up to `passages` passages with a register firing, one window of each."""
    atoms = {target: alive(study, bench, target) for target in bench.saes}
    registers = {target: sorted(x.atom[x["class"] == "register"].tolist()) for target, x in atoms.items()}
    given = dict(bench=bench, registers=registers)
    return dict(register_erase=study.stage("register_erase", bench.host.name, registers, _registers, **given))


def _registers(target: str, bench: Bench, registers: dict[str, list[int]]) -> pd.DataFrame:
    (windows, cell_sae, firings), tables = bench.heldout()[target], []
    firings = firings[firings.atom.isin(registers[target])]
    shuffled = firings.sample(frac=1.0, random_state=bench.seed).drop_duplicates("passage")
    numbers = np.sort(shuffled.window.to_numpy()[: bench.settings.passages])
    for start in range(0, len(numbers), PASSAGES):
        site = bench.site(windows, numbers[start : start + PASSAGES])
        part = firings[firings.window.isin(site.windows)]
        tables.append(erase_registers(site, part, cell_sae.sae, bench.first, bench.seed + start))
    return bench.placed(pd.concat(tables, ignore_index=True), target=target)


EXPERIMENTS = (erase_atoms, amplify, single, read_atoms, erase_all)
SUMMARIES = dict(
    cache_erase=summarise_erase,
    single_write=summarise_single,
    newlines=amplifying.summarise_newlines,
    readers=summarise_readers,
    register_erase=summarise_registers,
)


def run(study: Study) -> dict[str, pd.DataFrame]:
    """Write and return the tables of all experiments, by name."""
    parts: dict[str, list[pd.DataFrame]] = {}
    for host in study.profile.hosts:  # host by host, so that its stages share the harvests
        bench = make_bench(study, host)
        for experiment in EXPERIMENTS:
            for name, part in experiment(study, bench).items():
                parts.setdefault(name, []).append(part)
    return {name: study.gather(name, tables) for name, tables in parts.items()}


def tables(study: Study, measured: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Write and return results NAME_summary.csv for every name in SUMMARIES, and top_readers.csv."""
    seed = study.profile.seed
    summaries = {f"{name}_summary": summarise(measured[name], seed) for name, summarise in SUMMARIES.items()}
    summaries["top_readers"] = top_readers(measured["readers"], seed)
    return {name: study.write(name, table) for name, table in summaries.items()}
