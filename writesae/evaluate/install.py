"""Install (the paper's Sec. 4, App. I.6): write a direction at some positions so that the model says a token.

The directions are "paper", the native key with the value W_O[head]^T W_U[target], and "gamma", the top
singular pair of Gamma, the first-order influence on the target's logit; their norm is m native write norms.
Inclusion: the target is in the greedy continuation. Dose: the smallest m for which it is the next token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.edit import Edit, edited_hidden, generate
from writesae.hosts.base import Host, Run
from writesae.recurrence import torch_defaults
from writesae.shift import gamma, logit_gradient

DIRECTIONS = ("paper", "gamma")


@dataclass
class Setting:
    """A run of prompts, and R trials: each has a prompt, a target and native writes from `start` on.

    prompt, target, native_rank [R]; label [R]: the target's class; gradient [R, steps, d_v]: of the target's
    logit with respect to the head's output from start on; norms [R, writes]: of the native writes.
    """

    run: Run
    prompt: Tensor
    target: Tensor
    native_rank: Tensor
    label: np.ndarray
    start: int
    gradient: Tensor
    norms: Tensor

    def table(self, direction: str, **columns) -> pd.DataFrame:
        """Return one row per trial, with these columns."""
        trial = dict(prompt=self.prompt.numpy(), position=self.start, target=self.target.numpy())
        return pd.DataFrame(trial | dict(target_class=self.label, direction=direction) | columns)


def ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the rank of tokens [R] in logits [R, V]; 1 is the top."""
    return (logits > logits.gather(-1, tokens[:, None])).sum(-1) + 1


def word_token(tokenizer, word: str) -> int:
    """Return the token that a word is inside a text: after a space or, if those are several tokens, without one.

    Raises ValueError if the word is several tokens in both places, or only blanks.
    """
    if not word.strip():
        raise ValueError("Type a target word that is one token of the model, such as 'values'.")
    places = [("a", word)] if word[0].isspace() else [("a", f" {word}"), ("\n", word)]
    for before, form in places:
        texts = before, before + form, form
        start, whole, alone = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)
        # not `alone` where it can be helped: sentencepiece tokenizers put a blank before every text
        ids = whole[len(start) :] if whole[: len(start)] == start else alone
        if len(ids) == 1:
            return ids[0]
    several = f"{word!r} is {len(ids)} ({', '.join(repr(tokenizer.decode([i])) for i in ids)})"
    raise ValueError(f"The target must be one token, and {several}: type a more common word.")


def draw_targets(
    logits: Tensor, rank_classes: Mapping[str, tuple[int, int]], per_class: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Draw `per_class` tokens per prompt of each class of native ranks (first, last).

    Return targets [prompts, targets] and classes [targets]. Raises ValueError where a class has fewer tokens.
    """
    order, generator = logits.argsort(-1, descending=True), np.random.default_rng(seed)
    columns, labels = [], []
    for name, (first, last) in rank_classes.items():
        last = min(last, logits.shape[-1])
        if last - first + 1 < per_class:
            size = f"{max(0, last - first + 1)} of the {logits.shape[-1]} tokens"
            raise ValueError(f"{per_class} targets are asked for, and the class {name} has {size}: widen the class.")
        drawn = np.stack([generator.choice(np.arange(first, last + 1), per_class, False) for _ in logits])
        columns.append(order.gather(-1, torch.from_numpy(drawn) - 1))
        labels += [name] * per_class
    return torch.cat(columns, 1), np.array(labels)


@torch_defaults()
def setting(
    host: Host,
    run: Run,
    cell: tuple[int, int],
    targets: Tensor,
    labels: Sequence[str],
    distance: int,
    *,
    writes: int,
    write: str = "added",
) -> Setting:
    """Return a trial per prompt and target: `writes` writes from `distance` tokens before the end on.

    targets [prompts, targets], labels [targets]; write: the definition of the native write. Raises ValueError
    for targets of another shape, and for writes or a distance that do not fit into the prompt.
    """
    count, length = run.tokens.shape
    if targets.dim() != 2 or len(targets) != count:
        shapes = f"[prompts, targets] with {count} prompts here; got {list(targets.shape)}"
        raise ValueError(f"Targets are single tokens, {shapes}.")
    host.check_tokens(targets)
    start = length - distance
    if start < 0:
        problem = f"A prompt of {length} tokens has no place {distance} tokens before its end"
        raise ValueError(f"{problem}: lower the distance.")
    if writes > distance:
        raise ValueError(f"{writes} writes do not fit in the last {distance} tokens: raise the distance.")
    prompt = torch.arange(len(targets)).repeat_interleave(targets.shape[1])
    target = targets.flatten()
    starts = torch.full_like(prompt, start)
    gradient, native = logit_gradient(host, run, *cell, prompt, starts, distance, target)
    factors = host.factors(run, *cell)
    places = start + torch.arange(writes)
    norms = factors.key[:, places].norm(dim=-1) * factors.write(write)[:, places].norm(dim=-1)
    label = np.tile(labels, len(targets))
    return Setting(run, prompt, target, ranks(native, target), label, start, gradient, norms[prompt])


@torch_defaults()
def directions(host: Host, cell: tuple[int, int], trial: Setting, name: str) -> tuple[Tensor, Tensor]:
    """Return unit keys [R, writes, d_k] and values [R, writes, d_v]. ValueError for an unknown name."""
    factors, writes = host.factors(trial.run, *cell), trial.norms.shape[1]
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


@torch_defaults()
def write_edit(trial: Setting, key: Tensor, value: Tensor, magnitude: Tensor, pick=slice(None)) -> Edit:
    """Return the writes of the picked trials as an edit. magnitude [R]: in native write norms."""
    rows = trial.prompt[pick]
    positions = (trial.start + torch.arange(key.shape[1])).expand(len(rows), -1)
    size = (trial.norms[pick] * magnitude[:, None])[..., None]
    return Edit(rows, positions, key[pick], value[pick] * size, torch.ones(len(rows), dtype=torch.bool))


@torch_defaults()
def first_logits(host: Host, cell: tuple[int, int], trial: Setting, edit: Edit, batch_rows: int = 512) -> Tensor:
    """Return the logits [R, V] at the end of the prompt under the edit."""
    steps = trial.run.tokens.shape[1] - trial.start
    hidden = (edited_hidden(host, trial.run, *cell, piece, steps) for piece in edit.split(batch_rows))
    return torch.cat([host.logits(final[:, -1]) for final in hidden])


@torch_defaults()
def trials(
    host: Host,
    cell: tuple[int, int],
    trial: Setting,
    native: Tensor,
    *,
    magnitudes: Sequence[float],
    new_tokens: int,
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Return one row per trial, direction and magnitude (in native write norms): ranks, inclusion, lift.

    native: the unedited continuations [prompts, new_tokens].
    """
    target, rows = trial.target[:, None], []
    native_log_p = F.log_softmax(host.logits(trial.run.final[:, -1]), -1)[trial.prompt].gather(-1, target)[:, 0]
    included_native = (native[trial.prompt] == target).any(1).int().numpy()
    for name in DIRECTIONS:
        key, value = directions(host, cell, trial, name)
        for magnitude in magnitudes:
            edit = write_edit(trial, key, value, torch.full((len(key),), magnitude))
            pieces = [generate(host, trial.run, *cell, piece, new_tokens) for piece in edit.split(batch_rows)]
            tokens, logits = (torch.cat(x) for x in zip(*pieces, strict=True))
            log_p = F.log_softmax(logits, -1).gather(-1, target)[:, 0]
            columns = dict(magnitude=magnitude, native_rank=trial.native_rank.numpy())
            columns |= dict(edited_rank=ranks(logits, trial.target).numpy(), included_native=included_native)
            columns |= dict(included_edited=(tokens == target).any(1).int().numpy())
            rows.append(trial.table(name, **columns, first_step_lift=(log_p - native_log_p).numpy()))
    return pd.concat(rows, ignore_index=True)


@torch_defaults()
def doses(
    host: Host, cell: tuple[int, int], trial: Setting, *, grid: Sequence[float], bisections: int, batch_rows: int = 512
) -> pd.DataFrame:
    """Return one row per trial and direction: its dose on the grid, refined by bisection, or infinity."""
    rows = []
    for name in DIRECTIONS:
        key, value = directions(host, cell, trial, name)

        def succeeds(pick, magnitude, key=key, value=value):
            logits = first_logits(host, cell, trial, write_edit(trial, key, value, magnitude, pick), batch_rows)
            return logits.argmax(-1) == trial.target[pick]

        low, high = torch.zeros(len(key)), torch.full((len(key),), torch.inf)
        for dose in map(float, grid):
            waiting = torch.nonzero(high.isinf())[:, 0]
            won = succeeds(waiting, torch.full((len(waiting),), dose)) if len(waiting) else waiting.bool()
            high[waiting[won]] = low[waiting[~won]] = dose
        reached = torch.nonzero(high.isfinite())[:, 0]
        for _ in range(bisections if len(reached) else 0):
            middle = (low[reached] + high[reached]) / 2
            won = succeeds(reached, middle)
            high[reached[won]], low[reached[~won]] = middle[won], middle[~won]
        rows.append(trial.table(name, native_rank=trial.native_rank.numpy(), dose=high.double().numpy()))
    return pd.concat(rows, ignore_index=True)


@torch_defaults()
def native_continuations(host: Host, run: Run, new_tokens: int) -> Tensor:
    """Return the unedited greedy continuations [prompts, new_tokens]."""
    count, length = run.tokens.shape
    ends = torch.full((count,), length)
    pasts = [host.past_at(record, torch.arange(count), ends) for record in run.records]
    return host.decode(pasts, host.logits(run.final[:, -1]).argmax(-1), length, new_tokens - 1)
