"""Multi-query associative recall: a test bed for state dictionaries in which the right answer is known.

A context shows pairs k1 v1 ... kn vn of different keys, then asks for some of them: a key, and its value. A
host of one recurrent layer with one head, whose convolution (or token shift) reaches back one token, stores
an *association* (key, value) in one write, at the value's position. That write depends on the two tokens
alone, so the true dictionary of writes is known exactly (`true_writes`).

The firing at a pair is the atom with the largest coefficient at the value's position. Definitions, for the
pairs of some contexts:

| word     | meaning                                                                                       |
|----------|-----------------------------------------------------------------------------------------------|
| purity   | share of pairs whose atom fires more often at the pair's association than at any other one    |
| own atom | of an association, if an atom fires at more than half of its pairs, and the association is at |
|          | more than half of the pairs at which that atom fires                                          |
| cosine   | of an association's true write and the nearest atom, in the Frobenius inner product           |
| kept     | a query that was answered right is still answered right when the pair's write is replaced     |
| others   | share of the other queries, of those answered right before, that are still answered right     |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.edit import make_edit, transport
from writesae.evaluate.atoms import inner_products
from writesae.evaluate.firings import CellSAE, encode_cell, firings_at, trained_on
from writesae.evaluate.replacement import Terms, full_rank
from writesae.hosts.base import Host
from writesae.recurrence import torch_defaults
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.sae.parts import RankOneDecoder


class Contexts(NamedTuple):
    """N contexts: tokens [N, 2 pairs + 2 queries], and the number of the pair of each query, [N, queries]."""

    tokens: Tensor
    asked: Tensor

    @property
    def pairs(self) -> int:
        return self.tokens.shape[1] // 2 - self.asked.shape[1]

    @property
    def shown(self) -> tuple[Tensor, Tensor]:
        """The keys and the values of the pairs, each [N, pairs]; pair j is written at position 2 j + 1."""
        return self.tokens[:, : 2 * self.pairs : 2], self.tokens[:, 1 : 2 * self.pairs : 2]

    @property
    def answers(self) -> Tensor:
        """The value of each query, [N, queries]."""
        return self.tokens[:, 2 * self.pairs + 1 :: 2]

    def at_queries(self, x: Tensor) -> Tensor:
        """Return x [N, T, ...] at the keys of the queries, where the answers are predicted."""
        return x[:, 2 * self.pairs :: 2]


@dataclass(frozen=True)
class Task:
    """Numbers of key and value tokens; token ids are the keys from 0 on, then the values.

    shown: contexts show only the first `shown` keys (0: all). choices: how many values a key can have, drawn
    once (0: all). Association number a is value `a % choices` of key `a // choices`.
    """

    keys: int
    values: int
    shown: int = 0
    choices: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.shown <= self.keys != 0 and 0 <= self.choices <= self.values != 0):
            raise ValueError(f"A task has keys and values, and shows no more than those; got {self}.")

    def possible(self) -> Tensor:
        """Return the possible values of each shown key as token ids, [shown, choices]."""
        generator = torch.Generator().manual_seed(0)
        drawn = torch.rand(self.shown or self.keys, self.values, generator=generator).argsort(1)
        return self.keys + drawn[:, : self.choices or self.values]

    def draw(self, count: int, pairs: int, queries: int, generator: torch.Generator) -> Contexts:
        """Return `count` random contexts. Raises ValueError for too many pairs or queries."""
        possible = self.possible()
        if not 1 <= queries <= pairs <= len(possible):
            raise ValueError(f"Give at most {len(possible)} pairs and one query each, not {pairs} and {queries}.")
        keys = torch.rand(count, len(possible), generator=generator).argsort(1)[:, :pairs]
        values = possible[keys, torch.randint(possible.shape[1], keys.shape, generator=generator)]
        order = torch.rand(count, pairs, generator=generator).argsort(1)[:, :queries]
        shown = torch.stack([keys, values], 2).flatten(1)
        asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
        return Contexts(torch.cat([shown, asked], 1), order)

    def associations(self, contexts: Contexts) -> Tensor:
        """Return the association of each pair, [N, pairs]."""
        keys, values = contexts.shown
        possible = self.possible()
        return keys * possible.shape[1] + (possible[keys] == values[..., None]).int().argmax(-1)


@torch_defaults()
def answered(host: Host, contexts: Contexts) -> Tensor:
    """Return which queries the host answers with the right value, bool [N, queries]."""
    logits = host.logits(contexts.at_queries(host.run(contexts.tokens).final))
    return logits.argmax(-1) == contexts.answers


def answer_loss(host: Host, contexts: Contexts) -> Tensor:
    """Return the mean loss at the queries in nats, differentiable in the parameters of the host's model."""
    final = host._forward(contexts.tokens, host.layers)[1]
    logits = host.unembed(contexts.at_queries(final)).float()
    return F.cross_entropy(logits.flatten(0, 1), contexts.answers.flatten())


# Which associations have an atom


@torch_defaults()
def writes_of(host: Host, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return key [n, d_k] and value side [n, d_v] of the writes that store token pairs key, value [n].

    Raises ValueError for a host with several cells.
    """
    if len(host.cells) > 1:
        raise ValueError(f"{host.name} has {len(host.cells)} cells: a recall host has a single one.")
    factors = host.factors(host.run(torch.stack([key, value], 1)), *host.cells[0])
    return factors.key[:, 1], factors.added[:, 1]


def true_writes(host: Host, task: Task) -> tuple[Tensor, Tensor]:
    """Return `writes_of` all A associations of a task, in order: key [A, d_k] and value side [A, d_v]."""
    possible = task.possible()
    keys = torch.arange(len(possible))[:, None].expand_as(possible)
    return writes_of(host, keys.flatten(), possible.flatten())


def true_dictionary(key: Tensor, value: Tensor) -> SAE:
    """Return the SAE whose atoms are the true writes [A, d_k], [A, d_v], k = 1: the ceiling of SAEs."""
    sae = SAE(Architecture(n_atoms=len(key), k=1, centre="none"), key.shape[1], value.shape[1]).to(key.dtype)
    for part in (sae.encoder, sae.decoder):
        part.assign(torch.arange(len(key)), F.normalize(key, dim=-1), F.normalize(value, dim=-1))
    return sae.requires_grad_(False)


def pair_places(contexts: Contexts) -> pd.DataFrame:
    """Return all pairs in order: window, pair, position."""
    window, pair = torch.meshgrid(torch.arange(len(contexts.tokens)), torch.arange(contexts.pairs), indexing="ij")
    columns = dict(window=window, pair=pair, position=2 * pair + 1)
    return pd.DataFrame({name: x.flatten().numpy() for name, x in columns.items()})


@torch_defaults()
def associations(cell_sae: CellSAE, contexts: Contexts, task: Task, writes: tuple[Tensor, Tensor]) -> pd.DataFrame:
    """Return one row per association that the contexts show.

    Columns: association; n, its pairs; atom, the one that fires most often there (-1: none fires); recall,
    the share of its pairs at which that atom fires; precision, the share of the pairs at which the atom fires
    that are of this association; own; pure, the share of its pairs whose atom fires most often at this
    association; cosine. cell_sae: an SAE applied to these contexts. writes: `true_writes`.
    """
    firings = firings_at(cell_sae, pair_places(contexts))
    firings["association"] = task.associations(contexts).flatten().numpy()
    firings["atom"] = firings.atom.where(firings.coefficient > 0, -1)
    counts = pd.crosstab(firings.association, firings.atom)
    counts[-1] = 0  # nothing fires: that is no atom
    n, fired = firings.groupby("association").size(), counts.sum(axis=0).clip(lower=1)
    atom = counts.idxmax(axis=1).where(counts.max(axis=1) > 0, -1)
    hits = pd.Series(counts.max(axis=1), dtype=float)
    table = pd.DataFrame(dict(n=n, atom=atom, recall=hits / n, precision=hits / fired[atom].to_numpy()))
    table["own"] = (table.recall > 0.5) & (table.precision > 0.5)
    majority = counts.eq(counts.max(axis=0)) & (counts > 0)
    table["pure"] = (counts.where(majority, 0) / majority.sum(axis=0).clip(lower=1)).sum(axis=1) / n
    sides = tuple(F.normalize(x, dim=-1)[table.index.tolist()] for x in writes)
    table["cosine"] = inner_products(sides, cell_sae.sae.atoms()).max(1).values.numpy()
    return table.reset_index()


# What the host answers when a write is replaced


class Trials:
    """A drawn query per context, and what the host answers to all queries when its pair's write changes.

    query [N]: its number; place [N]: the position of its pair's write; native: the factors there; run: the
    native run; right [N, queries]: which queries are answered right.
    """

    @torch_defaults()
    def __init__(self, host: Host, contexts: Contexts, seed: int):
        self.host, self.contexts, (self.layer, self.head) = host, contexts, host.cells[0]
        count, queries = contexts.asked.shape
        self.rows = torch.arange(count)
        self.query = torch.randint(queries, (count,), generator=torch.Generator().manual_seed(seed))
        self.place = 2 * contexts.asked[self.rows, self.query] + 1
        self.run = host.run(contexts.tokens)
        self.factors = host.factors(self.run, self.layer, self.head)
        self.native = self.factors.at(self.rows, self.place)
        self.right = host.logits(contexts.at_queries(self.run.final)).argmax(-1) == contexts.answers

    def _reads(self, left: Tensor) -> Tensor:
        """Return what the head reads, [N, T, r], of key sides [N, r, d_k] that enter at the places."""
        unit = torch.eye(left.shape[1], dtype=left.dtype).expand(len(left), -1, -1)
        edit = make_edit(self.rows, self.place, left, unit)
        return transport(self.factors, edit, torch.zeros_like(self.rows), self.run.tokens.shape[1])[0]

    @cached_property
    def reads(self) -> Tensor:
        """What the head reads of a write at the place, [N, T, d_k]: a change X of it changes the output by
        X^T reads.

        It has all decays and erasures, and is the same for all changes."""
        return self._reads(torch.eye(self.host.d_k, dtype=self.native.key.dtype).expand(len(self.rows), -1, -1))

    @cached_property
    def native_reads(self) -> Tensor:
        """The same for the native key side alone, [N, T, 1]."""
        return self._reads(self.native.key[:, None])

    def _under(self, change: Tensor) -> Tensor:
        start = torch.zeros_like(self.rows)
        hidden, _ = self.host.branch(self.run, self.layer, self.head, self.rows, start, change)
        return self.host.logits(self.contexts.at_queries(hidden))

    @torch_defaults()
    def logits(self, new: Terms) -> Tensor:
        """Return the logits [N, queries, V] with other matrices in the place of the native writes."""
        taken_out = self.native_reads * self.native.added[:, None]
        return self._under((self.reads @ new[0].mT) @ new[1] - taken_out)

    @torch_defaults()
    def logits_of_value(self, value: Tensor) -> Tensor:
        """Return the logits [N, queries, V] with other value sides [N, d_v]; zeros delete the writes."""
        return self._under(self.native_reads * (value - self.native.added)[:, None])

    def outcome(self, name: str, logits: Tensor) -> dict[str, Tensor]:
        """Return kept_NAME, others_NAME (defined above; nan without others), loss_NAME (nats), each [N]."""
        still = (logits.argmax(-1) == self.contexts.answers) & self.right
        drawn = F.one_hot(self.query, self.right.shape[1]).bool()
        others = self.right & ~drawn
        loss = F.cross_entropy(logits.mT, self.contexts.answers, reduction="none")
        columns = dict(kept=still[drawn], others=(still & others).sum(1) / others.sum(1), loss=loss[drawn])
        return {f"{column}_{name}": x for column, x in columns.items()}

    def table(self, outcomes: dict[str, Tensor]) -> pd.DataFrame:
        """Return one row per context: context, pair, right (of the drawn query, natively), and outcomes."""
        right = self.right[self.rows, self.query]
        columns = dict(context=self.rows, pair=self.place // 2, right=right) | outcomes
        return pd.DataFrame({name: x.numpy() for name, x in columns.items()})


@torch_defaults()
def replaced(trials: Trials, cell_sae: CellSAE, seed: int) -> pd.DataFrame:
    """Return one row per context, with `Trials.outcome` of each condition in the place of the pair's write.

    Conditions, atom: the firing's atom at its coefficient; matched: at the norm of the native write;
    reconstruction: all active atoms, with the offset for an SAE of writes; random: another atom that fires in
    these contexts, at the coefficient; delete: nothing. Columns atom, coefficient, cosine: of the firing.
    Raises ValueError for atoms of another rank than 1, for another write than "added", and for a single atom.
    """
    if not isinstance(cell_sae.sae.decoder, RankOneDecoder) or cell_sae.write != "added":
        raise ValueError("The recall test takes SAEs with atoms of rank 1, of added writes or of states.")
    if len(cell_sae.alive) < 2:
        raise ValueError("The recall test needs two atoms that fire in these contexts.")
    where = trials.rows, trials.place
    key, value = cell_sae.sae.atoms()
    indices, coefficients = cell_sae.indices[where], cell_sae.coefficients[where]
    largest, slot = coefficients.max(1)
    atom, alive = indices.gather(1, slot[:, None])[:, 0], cell_sae.alive
    shift = torch.randint(1, len(alive), atom.shape, generator=torch.Generator().manual_seed(seed))
    other = alive[(torch.searchsorted(alive, atom) + shift) % len(alive)]
    native = trials.native
    norm = native.key.norm(dim=-1) * native.added.norm(dim=-1)
    active = key[indices], coefficients[..., None] * value[indices]
    if cell_sae.target == "write" and cell_sae.sae.offset.any():
        offset = full_rank(cell_sae.sae.offset.expand(len(atom), -1, -1))
        active = tuple(torch.cat(sides, 1) for sides in zip(active, offset, strict=True))
    put_in = {
        "atom": (key[atom][:, None], (largest[:, None] * value[atom])[:, None]),
        "matched": (key[atom][:, None], (norm[:, None] * value[atom])[:, None]),
        "reconstruction": active,
        "random": (key[other][:, None], (largest[:, None] * value[other])[:, None]),
    }
    cosine = (key[atom] * native.key).sum(-1) * (value[atom] * native.added).sum(-1) / norm
    columns = dict(atom=atom, coefficient=largest, cosine=cosine)
    for name, new in put_in.items():
        columns |= trials.outcome(name, trials.logits(new))
    return trials.table(columns | trials.outcome("delete", trials.logits_of_value(torch.zeros_like(native.added))))


@torch_defaults()
def rewritten(trials: Trials, task: Task, seed: int) -> pd.DataFrame:
    """Return one row per context: what a counterfactual write and a deletion do to all of its queries.

    counterfactual: the value side of the write that stores the key with another, random value, on the native
    key side. says_new: the host then answers with that value. Other columns: `Trials.outcome` for both edits.
    """
    contexts, generator = trials.contexts, torch.Generator().manual_seed(seed)
    asked = contexts.asked[trials.rows, trials.query]
    key, value = (x[trials.rows, asked] for x in contexts.shown)
    shift = torch.randint(1, task.values, value.shape, generator=generator)
    new = task.keys + (value - task.keys + shift) % task.values
    written = writes_of(trials.host, key, new)[1]
    logits = trials.logits_of_value(written)
    columns = dict(says_new=logits.argmax(-1)[trials.rows, trials.query] == new)
    columns |= trials.outcome("counterfactual", logits)
    return trials.table(columns | trials.outcome("delete", trials.logits_of_value(torch.zeros_like(written))))


@torch_defaults()
def recall_benchmark(
    host: Host, sae: SAE, task: Task, contexts: Contexts, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `associations` and `replaced` of any SAE of a recall host's cell, on held-out contexts.

    Raises ValueError for a host with several cells and for an SAE that does not say what it was trained on.
    """
    trials, writes = Trials(host, contexts, seed), true_writes(host, task)
    cell_sae = encode_cell(host.cells[0], *trained_on(sae, None, None), sae, trials.factors)
    return associations(cell_sae, contexts, task, writes), replaced(trials, cell_sae, seed)
