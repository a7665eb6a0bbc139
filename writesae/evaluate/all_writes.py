"""All writes of a cell at once: replace the write at every position of a window, and measure the loss.

The transitions A_t (decay and erase) stay native. The state then moves by dS_t = A_t dS_{t-1} + new_t -
native_t, the head's output by dS_t^T q_t, and the layers above run again. Where the native write is the
"effective" one, it includes the erase, and A_t is the decay alone.

| condition        | in place of every native write                                                      |
|------------------|-------------------------------------------------------------------------------------|
| native           | the native write: changes nothing                                                   |
| none             | nothing                                                                             |
| mean_write       | the cell's mean write                                                               |
| token_mean_write | the mean write of the token's id, or the cell's where that id was not seen          |
| atom             | the atom with the largest coefficient, at that coefficient                          |
| atom_and_mean    | the same plus the SAE's offset (of SAEs of writes that have one)                    |
| projection       | the atom with the largest |<atom, write>|, at <atom, write>                         |
| reconstruction   | all active atoms at their coefficients, plus the offset for SAEs of writes          |
| read             | (SAEs of states) no write changes; the head reads the state's whole reconstruction  |

An SAE of states encodes the native state, an SAE of writes the native write. For atoms of a higher rank,
single atoms are their top singular pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.evaluate.atoms import inner_products
from writesae.evaluate.firings import trained_on
from writesae.history import History
from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors, torch_defaults
from writesae.sae.model import SAE
from writesae.text import Windows

WITHOUT_SAE = ("native", "none", "mean_write", "token_mean_write")
WITH_SAE = ("atom", "atom_and_mean", "projection", "reconstruction", "read")

NewWrites = Callable[[int], Tensor]  # position -> the matrices [N, d_k, d_v] that enter N states there


@dataclass
class MeanWrites:
    """Mean writes of a cell: of the token ids `tokens` [U], ascending, and of all tokens.

    matrices [U + 1, d_k, d_v]: the mean write of each id, and last that of all tokens.
    """

    tokens: Tensor
    matrices: Tensor

    @classmethod
    def of(cls, writes: History, tokens: Tensor, wanted: Tensor) -> MeanWrites:
        """Return the means over the writes of windows with token ids `tokens` [N, T].

        wanted: token ids of any shape; the means of other ids are left out.
        """
        key, value = writes.key.flatten(0, 1), writes.value.flatten(0, 1)
        ids, order = tokens.flatten().sort(stable=True)
        seen, counts = ids.unique_consecutive(return_counts=True)
        kept, places = torch.isin(seen, wanted), order.split(counts.tolist())
        chosen = [places[number] for number in kept.nonzero()[:, 0].tolist()]
        means = [key[at].T @ value[at] / len(at) for at in chosen]
        return cls(seen[kept], torch.stack([*means, writes.mean()]))

    def numbers(self, ids: Tensor) -> Tensor:
        """Return which of `matrices` each token id has; ids without a mean have the last one."""
        return torch.where(torch.isin(ids, self.tokens), torch.searchsorted(self.tokens, ids), len(self.tokens))


def output_change(factors: Factors, new: Sequence[NewWrites], write: str = "added") -> Tensor:
    """Return the change of a head's output [len(new), N, T, d_v] if new writes replace all native ones.

    factors: the cell's, over a run's [N, T]. write: the definition of the native write. Raises ValueError
    as `Factors.write`.
    """
    transitions = factors if write == "added" else replace(factors, erase=None, probe=None)
    count, length = factors.key.shape[:2]
    d_k, d_v = factors.key.shape[-1], factors.added.shape[-1]
    moved, reads = factors.key.new_zeros(count, len(new) * d_v, d_k), []  # dS^T of all conditions
    for t in range(length):
        now = transitions.at(slice(None), t)
        native = now.key[:, :, None] * now.write(write)[:, None]
        entering = torch.stack([writes(t) - native for writes in new], 1).mT.flatten(1, 2)
        moved = now.transition(moved) + entering
        reads.append((moved @ now.query[:, :, None]).view(count, len(new), d_v))
    return torch.stack(reads, 2).transpose(0, 1)


def rank_one_writes(key: Tensor, value: Tensor) -> NewWrites:
    """Return the writes key_t value_t^T of key [N, T, d_k] and value [N, T, d_v]."""
    return lambda t: key[:, t, :, None] * value[:, t, None]


def writes_without_sae(factors: Factors, tokens: Tensor, means: MeanWrites, write: str) -> dict[str, NewWrites]:
    """Return the new writes of the conditions WITHOUT_SAE for a run over tokens [N, T]."""
    overall = means.matrices[-1].expand(len(tokens), -1, -1)
    nothing, numbers = torch.zeros_like(overall), means.numbers(tokens)
    return {
        "native": rank_one_writes(factors.key, factors.write(write)),
        "none": lambda t: nothing,
        "mean_write": lambda t: overall,
        "token_mean_write": lambda t: means.matrices[numbers[:, t]],
    }


def output_changes_by_sae(sae: SAE, factors: Factors, write: str) -> dict[str, Tensor]:
    """Return the change of the head's output [N, T, d_v] under each condition of WITH_SAE that the SAE has.

    Raises ValueError for an SAE that does not say its target.
    """
    target, _ = trained_on(sae, None, write)
    factors = factors.map(lambda x: x.to(sae.mean.dtype))
    indices, coefficients = sae.encode_history(factors.history(target, write))
    key, value = sae.atoms()
    largest, slot = coefficients.max(-1, keepdim=True)
    top = indices.gather(-1, slot)[..., 0]
    overlap = inner_products((factors.key, factors.write(write)), (key, value))
    best = overlap.abs().argmax(-1, keepdim=True)
    atom = rank_one_writes(largest * key[top], value[top])
    projection = rank_one_writes(overlap.gather(-1, best) * key[best[..., 0]], value[best[..., 0]])

    def decoded(t: int) -> Tensor:
        return sae.decode(indices[:, t], coefficients[:, t])

    new = {"atom": atom, "projection": projection}
    if target == "state":
        new["reconstruction"] = lambda t: decoded(t) - sae.offset
        new["none"] = lambda t: sae.offset.new_zeros(len(top), *sae.offset.shape)
    else:
        new["reconstruction"] = decoded
        if sae.config.centre != "none":
            new["atom_and_mean"] = lambda t: atom(t) + sae.offset
    changes = dict(zip(new, output_change(factors, list(new.values()), write), strict=True))
    if target == "state":  # without writes the read is zero: that change is minus the native read
        reads = [decoded(t).mT @ factors.query[:, t, :, None] for t in range(factors.key.shape[1])]
        changes["read"] = torch.stack(reads, 1)[..., 0] + changes.pop("none")
    return changes


def _changes(host: Host, run: Run, layer: int, heads, saes, means, write) -> Iterator[tuple[tuple, Tensor]]:
    """Yield ((name of the SAEs or "", condition), change of the heads' outputs [N, T, heads, d_v])."""
    factors = {head: host.factors(run, layer, head) for head in heads}
    by_head = []
    for head in heads:
        new = writes_without_sae(factors[head], run.tokens, means[head], write)
        by_head.append(dict(zip(new, output_change(factors[head], list(new.values()), write), strict=True)))
    for condition in WITHOUT_SAE:
        yield ("", condition), torch.stack([changes[condition] for changes in by_head], 2)
    for name, of_heads in saes.items():
        by_head = [output_changes_by_sae(of_heads[head], factors[head], write) for head in heads]
        for condition in filter(by_head[0].__contains__, WITH_SAE):
            yield (name, condition), torch.stack([changes[condition] for changes in by_head], 2)


def window_losses(host: Host, final: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean loss [N] per predicted token in nats: last hidden states [N, T, D], tokens [N, T]."""
    pairs = zip(final, tokens, strict=True)
    return torch.stack([F.cross_entropy(host.logits(x[:-1]), following[1:]) for x, following in pairs])


@torch_defaults()
def replace_all_writes(
    host: Host,
    windows: Windows,
    saes: Mapping[str, Mapping[int, SAE]],
    means: Mapping[int, MeanWrites],
    *,
    layer: int,
    write: str | None = None,
    batch: int = 16,
) -> pd.DataFrame:
    """Replace all writes of one or more heads of a layer at once, and return the loss of every window.

    saes: name -> head -> SAE. means: head -> mean writes; its heads are those that are replaced, and each SAE
    name has all of them. write: the definition of the native write, by default that of the SAEs, else "added".
    batch: windows per run.

    Columns: sae (a name, or "" for the conditions WITHOUT_SAE), condition, window, passage, and loss and
    loss_native, means over predicted tokens in nats. Raises ValueError for SAEs of other cells or of different
    definitions of the write, and as `Host.branch` and `trained_on`.
    """
    heads, tables = list(means), []
    configs = [(head, sae.config) for of_heads in saes.values() for head, sae in of_heads.items()]
    for head, config in configs:
        if None not in (trained := (config.layer, config.head)) and trained != (layer, head):
            raise ValueError(f"An SAE of the cell (layer, head) {trained} is given for {(layer, head)}.")
    if write is None:
        definitions = {config.write for _, config in configs if config.write}
        if len(definitions) > 1:
            raise ValueError("These SAEs are of different definitions of the write: pass write.")
        write = definitions.pop() if definitions else "added"
    for start in range(0, len(windows), batch):
        part = windows[slice(start, start + batch)]
        run, rows = host.run(part.tokens), torch.arange(len(part))
        columns = dict(window=rows + start, passage=part.passage)
        columns["loss_native"] = window_losses(host, run.final, part.tokens)
        for (name, condition), change in _changes(host, run, layer, heads, saes, means, write):
            final, _ = host.branch(run, layer, heads, rows, torch.zeros_like(rows), change)
            losses = columns | dict(loss=window_losses(host, final, part.tokens))
            frame = pd.DataFrame({column: x.numpy() for column, x in losses.items()})
            tables.append(frame.assign(sae=name, condition=condition))
    return pd.concat(tables, ignore_index=True)
