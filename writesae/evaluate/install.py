"""Install (the paper's Sec. 4, App. I.6): write a direction at three consecutive positions so that the model says a token.

Two directions for a target token, both with the norm m x the native write's norm at each position:

- paper: the native key there, and W_O[head]^T W_U[target], normalised, as value;
- gamma: the top singular pair of Gamma, the exact first-order influence of a write there on the target's logit
  at the end of the prompt.

Inclusion is whether the target is among the greedily chosen tokens; the dose is the smallest magnitude at which it
becomes the very next token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from replication.study.profile import Install
from writesae.edit import Edit, generate, head_change
from writesae.hosts.base import Host, Run
from writesae.shift import gamma, logit_gradient

DIRECTIONS = ("paper", "gamma")


@dataclass
class Setting:
    """Prompts run together, and for each trial its prompt, target and the native writes at its positions.

    prompt, target, native_rank [R]; label: the target's class; start: first position; gradient [R, steps, d_v] of the
    target's logit from start on; norms [R, writes].
    """

    run: Run
    prompt: torch.Tensor
    target: torch.Tensor
    native_rank: torch.Tensor
    label: np.ndarray
    start: int
    gradient: torch.Tensor
    norms: torch.Tensor

    def table(self, direction: str, **columns) -> pd.DataFrame:
        """A line a trial: what it is, and these columns."""
        what = dict(prompt=self.prompt.numpy(), position=self.start, target=self.target.numpy())
        return pd.DataFrame(what | dict(target_class=self.label, direction=direction) | columns)


def ranks(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The rank of tokens [R] in logits [R, V]; 1 is the top."""
    return (logits > logits.gather(-1, tokens[:, None])).sum(-1) + 1


def draw_targets(logits: torch.Tensor, settings: Install, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Targets [prompts, targets] and their classes [targets]: random tokens whose native rank lies in each class.

    Raises ValueError where a class has fewer tokens than targets are asked for.
    """
    order, generator = logits.argsort(-1, descending=True), np.random.default_rng(seed)
    columns, labels = [], []
    for name, (first, last) in settings.rank_classes.items():
        last = min(last, logits.shape[-1])
        if last - first + 1 < settings.targets_per_class:
            raise ValueError(
                f"{settings.targets_per_class} targets are asked for, and the class {name} has {max(0, last - first + 1)} of "
                f"the {logits.shape[-1]} tokens: lower install.targets_per_class, or widen the class."
            )
        drawn = np.stack(
            [generator.choice(np.arange(first, last + 1), settings.targets_per_class, False) for _ in logits]
        )
        columns.append(order.gather(-1, torch.from_numpy(drawn) - 1))
        labels += [name] * settings.targets_per_class
    return torch.cat(columns, 1), np.array(labels)


def setting(
    host: Host, run: Run, cell, targets: torch.Tensor, labels: np.ndarray, distance: int, settings: Install, write
) -> Setting:
    """All trials of one distance: every prompt with every target.

    Raises ValueError for targets that are not single tokens, as many for every prompt of the run, and for writes or a
    distance that do not fit into the prompt.
    """
    if targets.dim() != 2 or len(targets) != len(run.tokens):
        raise ValueError(
            f"Targets are single tokens, [prompts, targets] with {len(run.tokens)} prompts here; got {list(targets.shape)}."
        )
    host.check_tokens(targets)
    length = run.tokens.shape[1]
    start = length - distance
    if start < 0:
        raise ValueError(
            f"A prompt of {length} tokens has no place {distance} tokens before its end: lower the distance."
        )
    if settings.writes > distance:
        raise ValueError(f"{settings.writes} writes do not fit in the last {distance} tokens: raise install.distances.")
    prompt = torch.arange(len(targets)).repeat_interleave(targets.shape[1])
    target = targets.flatten()
    starts = torch.full_like(prompt, start)
    gradient, native = logit_gradient(host, run, *cell, prompt, starts, distance, target)
    factors = host.factors(run, *cell)
    places = start + torch.arange(settings.writes)
    norms = factors.key[:, places].norm(dim=-1) * factors.write(write)[:, places].norm(dim=-1)
    return Setting(
        run, prompt, target, ranks(native, target), np.tile(labels, len(targets)), start, gradient, norms[prompt]
    )


def directions(host: Host, cell, trial: Setting, name: str, writes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit key [R, writes, d_k] and value [R, writes, d_v] of each trial's writes. ValueError for an unknown direction."""
    factors = host.factors(trial.run, *cell)
    if name == "paper":
        value = F.normalize(host.unembedding()[trial.target] @ host.output_projection(*cell), dim=-1)
        key = F.normalize(factors.key[trial.prompt, trial.start : trial.start + writes], dim=-1)
        return key, value[:, None].expand(-1, writes, -1)
    if name == "gamma":
        starts = torch.full_like(trial.prompt, trial.start)
        influence = gamma(factors, trial.prompt, starts, trial.gradient)[:, :writes]
        u, _, vh = torch.linalg.svd(influence, full_matrices=False)
        return u[..., 0], vh[..., 0, :]
    raise ValueError(f"There is no install direction {name!r}: choose one of {', '.join(DIRECTIONS)}.")


def write_edit(
    trial: Setting, key: torch.Tensor, value: torch.Tensor, magnitude: torch.Tensor, pick=slice(None)
) -> Edit:
    """The writes of the picked trials as one edit a row; magnitude [R] in native write norms. The writing token reads it."""
    count = key.shape[1]
    positions = (trial.start + torch.arange(count)).expand(len(trial.prompt[pick]), -1)
    size = (trial.norms[pick] * magnitude[:, None])[..., None]
    everywhere = torch.ones(len(positions), dtype=torch.bool)
    return Edit(trial.prompt[pick], positions, key[pick], value[pick] * size, everywhere)


@torch.no_grad()
def first_logits(host: Host, cell, trial: Setting, edit: Edit, batch_rows: int = 512) -> torch.Tensor:
    """Logits [R, V] at the end of the prompt under the edit."""
    factors, steps = host.factors(trial.run, *cell), trial.run.tokens.shape[1] - trial.start
    found = []
    for piece in edit.split(batch_rows):
        change, _ = head_change(factors, piece, steps)
        final, _ = host.branch(trial.run, *cell, piece.rows, piece.starts, change)
        found.append(host.logits(final[:, -1]))
    return torch.cat(found)


def trials(
    host: Host, cell, trial: Setting, native: torch.Tensor, settings: Install, batch_rows: int = 512
) -> pd.DataFrame:
    """Every magnitude and direction: greedy continuations under the edit. native: [prompts, new_tokens] unedited ones."""
    native_log_p = F.log_softmax(host.logits(trial.run.final[:, -1]), -1)[trial.prompt].gather(
        -1, trial.target[:, None]
    )[:, 0]
    rows = []
    for name in DIRECTIONS:
        key, value = directions(host, cell, trial, name, settings.writes)
        for magnitude in settings.magnitudes:
            edit = write_edit(trial, key, value, torch.full((len(key),), magnitude))
            made = [generate(host, trial.run, *cell, piece, settings.new_tokens) for piece in edit.split(batch_rows)]
            tokens, logits = (torch.cat(x) for x in zip(*made, strict=True))
            log_p = F.log_softmax(logits, -1).gather(-1, trial.target[:, None])[:, 0]
            rows.append(
                trial.table(
                    name,
                    magnitude=magnitude,
                    native_rank=trial.native_rank.numpy(),
                    edited_rank=ranks(logits, trial.target).numpy(),
                    included_native=(native[trial.prompt] == trial.target[:, None]).any(1).int().numpy(),
                    included_edited=(tokens == trial.target[:, None]).any(1).int().numpy(),
                    first_step_lift=(log_p - native_log_p).numpy(),
                )
            )
    return pd.concat(rows, ignore_index=True)


def doses(host: Host, cell, trial: Setting, settings: Install, batch_rows: int = 512) -> pd.DataFrame:
    """The smallest magnitude at which the target is the next token: the first success on the grid `doses`, refined by
    bisection between it and the grid point below. dose is infinite where no grid point succeeds."""
    rows = []
    for name in DIRECTIONS:
        key, value = directions(host, cell, trial, name, settings.writes)

        def succeeds(pick, magnitude, key=key, value=value):
            logits = first_logits(host, cell, trial, write_edit(trial, key, value, magnitude, pick), batch_rows)
            return logits.argmax(-1) == trial.target[pick]

        low, high = torch.zeros(len(key)), torch.full((len(key),), torch.inf)
        for dose in settings.doses:
            open_ = torch.nonzero(high.isinf())[:, 0]
            won = succeeds(open_, torch.full((len(open_),), float(dose))) if len(open_) else open_.bool()
            high[open_[won]], low[open_[~won]] = float(dose), float(dose)
        found = torch.nonzero(high.isfinite())[:, 0]
        for _ in range(settings.bisections if len(found) else 0):
            middle = (low[found] + high[found]) / 2
            won = succeeds(found, middle)
            high[found[won]], low[found[~won]] = middle[won], middle[~won]
        rows.append(trial.table(name, native_rank=trial.native_rank.numpy(), dose=high.double().numpy()))
    return pd.concat(rows, ignore_index=True)


@torch.no_grad()
def native_continuations(host: Host, run: Run, settings: Install) -> torch.Tensor:
    """The unedited greedy continuations [prompts, new_tokens]."""
    length = run.tokens.shape[1]
    rows = torch.arange(len(run.tokens))
    ends = torch.full_like(rows, length)
    pasts = [host.past_at(record, rows, ends) for record in run.records]
    first = host.logits(run.final[:, -1]).argmax(-1)
    return host.decode(pasts, first, length, settings.new_tokens - 1)
