"""The replacement test (the paper's Sec. 3.2, Table 2): replace a native write, and compare the outputs.

One row per firing (at position t), amplitude and read scope. For each condition: KL(native, patched) in nats
at t + 1, and the loss there, on token t + 2; for native, delete and atom also the top token at t + 1:

| condition       | replaces the native write                                                             |
|-----------------|---------------------------------------------------------------------------------------|
| delete          | nothing                                                                               |
| atom            | the firing's atom (for a higher rank, its top singular pair)                          |
| random          | another alive atom                                                                    |
| reconstruction  | the SAE's reconstruction: all active atoms, plus the offset for SAEs of writes        |
| atom_and_mean   | the firing's atom plus the offset, for SAEs of writes that have one (only on request) |
| mean_write      | the cell's mean write                                                                 |
| resampled       | the native write of another position                                                  |
| native_rescaled | the native write itself, at the atom's norm                                           |
| flat_svd        | the top singular pair of a flat SAE's reconstruction of the state (App. F.4)          |
| whole_atom      | the firing's atom itself, where its rank is above 1 (only on request)                 |

At the amplitude "coefficient" the norm is the atom's coefficient, and the reconstruction and atom_and_mean
keep their own. At "matched_norm" it is the Frobenius norm of the native write. At "projection" each
replacement has the amplitude that brings it nearest to the native write in that norm, which may be negative.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from warnings import warn

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.edit import SCOPES, head_change, kl, make_edit
from writesae.evaluate.firings import CellSAE, Places, encode_cell, trained_on
from writesae.harvesting import harvest
from writesae.hosts.base import Host, Run
from writesae.recurrence import Factors, torch_defaults
from writesae.sae.model import SAE
from writesae.sae.parts import RankOneDecoder
from writesae.sae.train import top_singular_pair
from writesae.text import Windows

AMPLITUDES = ("coefficient", "matched_norm")  # of the paper; "projection" only on request
CONDITIONS = ("delete", "atom", "random", "reconstruction", "mean_write", "resampled", "native_rescaled", "flat_svd")
RANKS = (  # conditions whose terms have the same rank run together
    ("atom", "random", "resampled", "native_rescaled", "flat_svd"),
    ("reconstruction", "mean_write", "whole_atom", "atom_and_mean"),
)
OWN_NORM = ("reconstruction", "atom_and_mean")  # replacements that have a norm of their own
STEPS = 2  # the writing token and the next one

Conditions = Sequence[str] | Mapping[str, Sequence[str]]
Terms = tuple[Tensor, Tensor]  # left [n, r, d_k], right [n, r, d_v]: n matrices of rank r


def rank_one(key: Tensor, value: Tensor) -> Terms:
    """Return terms (left [n, 1, d_k], right [n, 1, d_v]) of unit Frobenius norm."""
    return F.normalize(key, dim=-1)[:, None], F.normalize(value, dim=-1)[:, None]


def full_rank(matrices: Tensor) -> Terms:
    """Return any matrices [n, d_k, d_v] as terms (left [n, d_k, d_k], right [n, d_k, d_v])."""
    return torch.eye(matrices.shape[1], dtype=matrices.dtype).expand(len(matrices), -1, -1), matrices


def inner(terms: Terms, key: Tensor, value: Tensor) -> Tensor:
    """Return the Frobenius inner products [n] of terms with key value^T: key [n, d_k], value [n, d_v]."""
    left, right = terms
    return ((left @ key[:, :, None]) * (right @ value[:, :, None])).sum((1, 2))


def squared_norm(terms: Terms) -> Tensor:
    """Return the squared Frobenius norms [n] of terms."""
    left, right = terms
    return ((left @ left.mT) * (right @ right.mT)).sum((1, 2))


def scaled(terms: Terms, amplitude: Tensor) -> Terms:
    """Return terms times numbers [n]."""
    return terms[0], terms[1] * amplitude[:, None, None]


def projected(terms: Terms, key: Tensor, value: Tensor) -> Terms:
    """Return terms at the amplitude that brings them nearest to key value^T in Frobenius norm.

    key [n, d_k], value [n, d_v]. A matrix of zeros stays zero.
    """
    size = squared_norm(terms)
    return scaled(terms, torch.where(size > 0, inner(terms, key, value) / size, 0.0))


def replacements(cell_sae: CellSAE, places: Places, factors: Factors, seed: int) -> dict[str, Terms]:
    """Return the replacements of all conditions except delete, with unit norm except for those of OWN_NORM.

    factors: of the cell over the run. Random draws depend only on the seed and the firing.
    """
    window, position, atom = places.window, places.position, places.atom
    key, value = cell_sae.sae.atoms()
    uniform = places.draw(seed, lambda generator: torch.rand(2, generator=generator, dtype=torch.float64))
    alive = cell_sae.alive
    other = alive[(uniform[:, 0] * len(alive)).long()]
    neighbour = alive[(torch.searchsorted(alive, atom) + 1) % len(alive)]
    other = torch.where(other == atom, neighbour, other)
    keys, values = (x.flatten(0, 1) for x in (cell_sae.writes.key, cell_sae.writes.value))
    drawn = (uniform[:, 1] * len(keys)).long()
    mean, native = cell_sae.mean_write.expand(len(atom), -1, -1), factors.at(places.row, position)
    put_in = {
        "atom": rank_one(key[atom], value[atom]),
        "random": rank_one(key[other], value[other]),
        "reconstruction": full_rank(reconstruction(cell_sae, window, position)),
        "mean_write": full_rank(mean / cell_sae.mean_write.norm()),
        "resampled": rank_one(keys[drawn], values[drawn]),
        "native_rescaled": rank_one(native.key, native.write(cell_sae.write)),
    }
    if has_offset(cell_sae):
        added = places.coefficient.float()[:, None, None] * key[atom][:, :, None] * value[atom][:, None]
        put_in["atom_and_mean"] = full_rank(cell_sae.sae.offset + added)
    if cell_sae.flat is not None:
        active = cell_sae.flat.encode(cell_sae.states.matrices(window, position))
        put_in["flat_svd"] = rank_one(*top_singular_pair(cell_sae.flat.decode(*active)))
    if not isinstance(cell_sae.sae.decoder, RankOneDecoder):
        whole = cell_sae.sae.decoder.weight()[atom].detach()
        put_in["whole_atom"] = full_rank(whole / whole.flatten(1).norm(dim=1)[:, None, None])
    return put_in


def has_offset(cell_sae: CellSAE) -> bool:
    """Return whether an SAE of writes adds its atoms to something."""
    return cell_sae.target == "write" and bool(cell_sae.sae.offset.any())


def reconstruction(cell_sae: CellSAE, window: Tensor, position: Tensor) -> Tensor:
    """Return the sum of all active atoms [n, d_k, d_v], plus the offset for an SAE of writes."""
    decoded = cell_sae.sae.decode(cell_sae.indices[window, position], cell_sae.coefficients[window, position])
    return decoded if cell_sae.target == "write" else decoded - cell_sae.sae.offset


def side_by_side(put_in: dict[str, Terms], names: Sequence[str], scales: dict[str, Tensor]) -> Terms:
    """Return conditions of the same rank at their norms: left, right [n, conditions, r, d]."""
    left = torch.stack([put_in[name][0] for name in names], 1)
    right = torch.stack([put_in[name][1] * scales[name][:, None, None] for name in names], 1)
    return left, right


def changes(factors: Factors, places: Places, take_out: Terms, put_in: Terms, scope: str) -> Tensor:
    """Return the head's change [n, conditions, STEPS, d_v] under each condition.

    take_out: the native write with a minus sign; put_in: terms [n, conditions, r, d] from `side_by_side`.
    """
    n, count = put_in[0].shape[:2]
    left, right = (
        torch.cat([out[:, None].expand(-1, count, -1, -1), side], 2).flatten(0, 1)
        for out, side in zip(take_out, put_in, strict=True)
    )
    rows, position = (x.repeat_interleave(count) for x in (places.row, places.position))
    edit = make_edit(rows, position, left, right, scope)
    return head_change(factors, edit, STEPS)[0].view(n, count, STEPS, -1)


def patched_logits(host: Host, run: Run, cell_sae: CellSAE, places: Places, change: Tensor) -> Tensor:
    """Return the logits [n, conditions, V] after the last step of each change [n, conditions, steps, d_v]."""
    rows, position = (x.repeat_interleave(change.shape[1]) for x in (places.row, places.position))
    hidden, _ = host.branch(run, cell_sae.layer, cell_sae.head, rows, position, change.flatten(0, 1))
    return host.logits(hidden[:, -1]).unflatten(0, change.shape[:2])


@torch_defaults()
def measure_terms(
    host: Host, run: Run, cell_sae: CellSAE, places: Places, put_in: dict[str, Terms], batch_rows: int = 512
) -> pd.DataFrame:
    """Return KL(native, patched) in nats at t + 1 with other matrices in the native write's place.

    One row per place, one column per name in `put_in`; the terms are put in at their own norm. cell_sae:
    gives the cell and the definition of its write. places: as for `replace`. batch_rows: edited rows per run.
    """
    factors, by_rank = host.factors(run, cell_sae.layer, cell_sae.head), {}
    for name, (left, _) in put_in.items():
        by_rank.setdefault(left.shape[1], []).append(name)
    names, parts = sum(by_rank.values(), []), []
    for part, some in places.pieces(len(put_in), batch_rows):
        native = factors.at(some.row, some.position)
        take_out = native.key[:, None], -native.write(cell_sae.write)[:, None]
        change = []
        for same in by_rank.values():
            terms = (torch.stack([put_in[name][side][part] for name in same], 1) for side in (0, 1))
            change.append(changes(factors, some, take_out, tuple(terms), "write"))
        patched = patched_logits(host, run, cell_sae, some, torch.cat(change, 1))
        parts.append(kl(host.logits(run.final[some.row, some.position + 1])[:, None], patched))
    return pd.DataFrame(torch.cat(parts).numpy(), columns=names)[list(put_in)]


@torch_defaults()
def replace(
    host: Host,
    run: Run,
    cell_sae: CellSAE,
    firings: pd.DataFrame,
    places: Places,
    seed: int,
    conditions: Conditions = CONDITIONS,
    scopes: Sequence[str] = SCOPES,
    amplitudes: Sequence[str] = AMPLITUDES,
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Return one row per firing, amplitude and read scope; the order of the rows depends on batch_rows.

    places: where the firings are in the run, each with two tokens after it. conditions: measured at every
    amplitude, or a mapping from amplitudes to conditions.
    """
    whole = not isinstance(cell_sae.sae.decoder, RankOneDecoder)
    available = dict(flat_svd=cell_sae.flat is not None, whole_atom=whole)
    available["atom_and_mean"] = has_offset(cell_sae)
    asked = conditions if isinstance(conditions, Mapping) else dict.fromkeys(amplitudes, conditions)
    measured = {a: [name for name in names if available.get(name, True)] for a, names in asked.items()}
    if not any(measured.values()):
        raise ValueError(
            f"This SAE has none of the conditions {', '.join(dict.fromkeys(sum(map(list, asked.values()), [])))}."
        )
    factors, tables = host.factors(run, cell_sae.layer, cell_sae.head), []
    for part, some in places.pieces(len(scopes) * sum(map(len, measured.values())), batch_rows):
        put_in = replacements(cell_sae, some, factors, seed)
        native = factors.at(some.row, some.position)
        labels, change = _head_changes(factors, native, cell_sae, some, put_in, measured, scopes)
        logits = host.logits(run.final[some.row, some.position + 1])
        patched = patched_logits(host, run, cell_sae, some, change)
        following = run.tokens[some.row, some.position + STEPS]
        columns = _native_columns(native, cell_sae.write, put_in["atom"], logits, following)
        shared = firings.iloc[part].assign(**columns)
        tables += _tables(shared, labels, measured, logits, patched, following)
    where = {name: getattr(cell_sae, name) for name in ("layer", "head", "target", "write")}
    return pd.concat(tables, ignore_index=True).assign(host=host.name, **where)


def _scales(put_in: dict[str, Terms], names, amplitude: str, coefficient, key, write) -> dict[str, Tensor]:
    """Return the factor [n] of each of `names` at an amplitude; key [n, d_k], write [n, d_v]: native."""
    scales = {}
    for name in names:
        right = put_in[name][1]
        size = right.flatten(1).norm(dim=1) if name in OWN_NORM else 1.0  # left is the identity, or of norm 1
        if amplitude == "projection":
            scales[name] = inner(tuple(x.to(key) for x in put_in[name]), key, write) / size**2
        elif amplitude == "matched_norm":
            scales[name] = key.norm(dim=-1) * write.norm(dim=-1) / size
        else:
            scales[name] = torch.ones_like(coefficient) if name in OWN_NORM else coefficient
    return scales


def _head_changes(factors, native, cell_sae, places, put_in, measured, scopes) -> tuple[list[tuple], Tensor]:
    """Return labels (scope, amplitude or "", condition), and the head's change [n, labels, STEPS, d_v]."""
    key, write, coefficient = native.key, native.write(cell_sae.write), places.coefficient.float()
    take_out = key[:, None], -write[:, None]
    nothing = torch.zeros_like(key)[:, None, None], torch.zeros_like(write)[:, None, None]
    labels, parts = [], []
    for scope in scopes:
        labels.append((scope, "", "delete"))
        parts.append(changes(factors, places, take_out, nothing, scope))
        for amplitude, group in product(measured, RANKS):
            if names := [name for name in measured[amplitude] if name in group]:
                labels += [(scope, amplitude, name) for name in names]
                scales = _scales(put_in, names, amplitude, coefficient, key, write)
                terms = side_by_side(put_in, names, scales)
                parts.append(changes(factors, places, take_out, terms, scope))
    return labels, torch.cat(parts, 1)


def _native_columns(native: Factors, write: str, atom: Terms, logits: Tensor, following: Tensor) -> dict:
    """Return the columns of a firing's native write and native output."""
    key, value = native.key, native.write(write)
    atom_key, atom_value = (x[:, 0] for x in atom)
    cosine = (atom_key * F.normalize(key, dim=-1)).sum(-1) * (atom_value * F.normalize(value, dim=-1)).sum(-1)
    return dict(
        native_norm=(key.norm(dim=-1) * value.norm(dim=-1)).numpy(),
        cosine=cosine.numpy(),
        top1_native=logits.argmax(-1).numpy(),
        nll_native=F.cross_entropy(logits, following, reduction="none").numpy(),
    )


def _tables(shared: pd.DataFrame, labels: list[tuple], amplitudes, native: Tensor, patched, following) -> list:
    """Return a table per scope and amplitude: the shared columns, and KL and loss of every condition."""
    divergence, top = kl(native[:, None], patched), patched.argmax(-1)
    following = following.repeat_interleave(len(labels))
    loss = F.cross_entropy(patched.flatten(0, 1), following, reduction="none").view(-1, len(labels))
    tables = []
    for scope, amplitude in product(dict.fromkeys(label[0] for label in labels), amplitudes):
        table = shared.assign(amplitude=amplitude, read=scope)
        for column, label in enumerate(labels):
            if label[:2] in ((scope, ""), (scope, amplitude)):
                name = label[2]
                table[f"kl_{name}"] = divergence[:, column].numpy()
                table[f"nll_{name}"] = loss[:, column].numpy()
                if name in ("delete", "atom"):
                    table[f"top1_{name}"] = top[:, column].numpy()
        tables.append(table)
    return tables


def measure_group(
    host: Host,
    windows: Windows,
    drawn: list[tuple[CellSAE, pd.DataFrame]],
    start: int,
    size: int,
    seed: int,
    measure: Callable[..., pd.DataFrame] = replace,
    **options,
) -> pd.DataFrame:
    """Return `measure` of the firings in `size` windows from `start` on, with one native run for all."""
    tables, run = [], None
    for cell_sae, firings in drawn:
        part = firings[firings.window.between(start, start + size, inclusive="left")]
        if len(part):
            run = run or host.run(windows[slice(start, start + size)].tokens)
            places = Places.of(part, part.window.to_numpy() - start)
            tables.append(measure(host, run, cell_sae, part, places, seed, **options))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame({"host": []})


def _refuse_other_firings(cell_sae: CellSAE, firings: pd.DataFrame) -> None:
    """Raise ValueError unless nearly all firings are the SAE's: rounding may exchange two close atoms."""
    places = Places.of(firings)
    if (places.window >= len(cell_sae.indices)).any():
        raise ValueError(
            f"A firing is in window {int(places.window.max())}, and there are {len(cell_sae.indices)} windows."
        )
    same = cell_sae.indices[places.window, places.position] == places.atom[:, None]
    found = (cell_sae.coefficients[places.window, places.position] * same).sum(-1)
    other = (found - places.coefficient).abs() > 0.1 * places.coefficient.abs()
    if other.double().mean() > 0.1:
        raise ValueError(
            f"{int(other.sum())} of the {len(other)} firings are not of this SAE on these windows: pass the windows and "
            "the SAE that find_firings was given."
        )


@torch_defaults()
def replace_writes(
    host: Host,
    windows: Windows,
    sae: SAE,
    firings: pd.DataFrame,
    *,
    layer: int | None = None,
    head: int | None = None,
    target: str | None = None,
    write: str | None = None,
    conditions: Sequence[str] = CONDITIONS,
    scopes: Sequence[str] = ("write",),
    amplitudes: Sequence[str] = AMPLITUDES,
    seed: int = 0,
    batch: int = 16,
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Replace the native write at each firing, and return one row per firing, amplitude and read scope.

    Columns: the firing, and `kl_CONDITION` (nats), `nll_CONDITION`, ... as described above. firings: rows of
    `find_firings` on these windows; those without two tokens after them are left out. Cell, target and write
    are by default those in the SAE's config. batch, batch_rows: windows and edited rows per run. Conditions that
    the SAE does not have are left out (`flat_svd` needs the `flat` of a `CellSAE`).

    Warns if the host computes in 16 bits: KLs of single writes are then mostly rounding. Raises ValueError for
    an unknown cell, target, condition, scope or amplitude, for firings of other windows or of another SAE, for
    "random" if only one atom fires, and where no firing is left.
    """
    cell = sae.config.layer if layer is None else layer, sae.config.head if head is None else head
    if None in cell:
        raise ValueError("This SAE does not say which cell it is of: pass layer and head.")
    choices = ((*CONDITIONS, "whole_atom", "atom_and_mean"), SCOPES, (*AMPLITUDES, "projection"))
    for asked, possible in zip((conditions, scopes, amplitudes), choices, strict=True):
        if unknown := [name for name in asked if name not in possible]:
            raise ValueError(f"The replacement test has no {unknown[0]!r}: choose among {', '.join(possible)}.")
        if not asked:
            raise ValueError(f"Nothing is asked of the replacement test: choose among {', '.join(possible)}.")
    if (dtype := next(host.model.parameters()).dtype).itemsize < 4:
        advice = "KLs of single writes are mostly rounding. Load it with dtype=torch.float32."
        warn(f"The host computes in {dtype}: {advice}", stacklevel=2)
    if not isinstance(windows, Windows):
        raise ValueError("The replacement test takes windows of cut_windows, not their tokens.")
    if lacking := {"window", "position", "atom", "coefficient"} - set(firings):
        raise ValueError(f"The firings lack {', '.join(sorted(lacking))}: pass rows of find_firings.")
    firings = firings[firings.position < windows.tokens.shape[1] - STEPS]
    if firings.empty:
        raise ValueError("There is nothing to replace: no firing has two tokens after it in its window.")
    factors = harvest(host, windows, [cell], batch, progress=False)[cell]
    cell_sae = encode_cell(cell, *trained_on(sae, target, write), sae, factors)
    _refuse_other_firings(cell_sae, firings)
    if "random" in conditions and len(cell_sae.alive) < 2:
        raise ValueError("Only one atom fires in these windows, so there is no random other one: leave out 'random'.")
    options = dict(conditions=conditions, scopes=scopes, amplitudes=amplitudes, batch_rows=batch_rows)
    starts = sorted({start - start % batch for start in firings.window})
    groups = [measure_group(host, windows, [(cell_sae, firings)], x, batch, seed, **options) for x in starts]
    return pd.concat(groups, ignore_index=True)
