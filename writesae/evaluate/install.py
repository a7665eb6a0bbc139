"""Install (the paper's Sec. 4, App. I.6): write a direction at some positions so that the model says a token.

The directions are those of writesae.evaluate.steering; their norm is m native write norms. Inclusion: the
target is in the greedy continuation. Dose: the smallest m for which it is the next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from writesae.edit import Edits, generate_under, kl
from writesae.evaluate.steering import Cell, Goal, directions, end_logits, part, refine, scaled
from writesae.hosts.base import Host, Run
from writesae.recurrence import torch_defaults
from writesae.text import token_ids

ONE_CELL = ("paper", "gamma")  # the directions of the paper's test in one cell


@dataclass
class Setting:
    """R trials: what their writes are for, the target's native rank [R], and the names of its class [R]."""

    goal: Goal
    native_rank: Tensor
    label: np.ndarray

    def table(self, direction: str, **columns) -> pd.DataFrame:
        """Return one row per trial, with these columns."""
        goal = self.goal
        trial = dict(prompt=goal.rows.numpy(), position=goal.start, target=goal.tokens.numpy())
        return pd.DataFrame(trial | dict(target_class=self.label, direction=direction) | columns)


def ranks(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the rank of tokens [R] in logits [R, V]; 1 is the top."""
    return (logits > logits.gather(-1, tokens[:, None])).sum(-1) + 1


def word_token(tokenizer, word: str) -> int:
    """Return the id of a word that is one token after a space or, if it is not, at the start of a line.

    Raises ValueError for several tokens in both places, and for blanks.
    """
    if not word.strip():
        raise ValueError("Type a target word that is one token of the model, such as 'values'.")
    places = [("a", word)] if word[0].isspace() else [("a", f" {word}"), ("\n", word)]
    for before, form in places:
        texts = before, before + form, form
        start, whole, alone = (token_ids(tokenizer, text) for text in texts)
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


def draw_out_of_context(
    logits: Tensor, prompts: Tensor, classes: Mapping[str, Tensor], beyond: int, per_class: int, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Draw `per_class` tokens per prompt of each class, neither in the prompt nor among its top `beyond`.

    logits [prompts, V]: native, after each of prompts [prompts, T]; classes: name -> bool [V]. Return targets
    [prompts, targets] and classes [targets]. Raises ValueError where a class has fewer tokens.
    """
    far = logits.argsort(-1, descending=True).argsort(-1) >= beyond
    far.scatter_(1, prompts, False)
    generator, columns = np.random.default_rng(seed), []
    for name, members in classes.items():
        candidates = [np.flatnonzero(row) for row in (far & members).numpy()]
        if (fewest := min(map(len, candidates))) < per_class:
            problem = f"{per_class} targets are asked for, and the class {name} has {fewest} beyond rank {beyond}"
            raise ValueError(f"{problem} that are not in a prompt: lower the rank.")
        columns.append(np.stack([generator.choice(ids, per_class, False) for ids in candidates]))
    return torch.from_numpy(np.concatenate(columns, 1)), np.repeat(list(classes), per_class)


@torch_defaults()
def setting(
    host: Host,
    run: Run,
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
    if targets.shape != (count, len(labels)):
        shapes = f"[prompts, targets], here {[count, len(labels)]} with their labels; got {list(targets.shape)}"
        raise ValueError(f"Targets are single tokens, {shapes}.")
    host.check_tokens(targets)
    if distance > length:
        problem = f"A prompt of {length} tokens has no place {distance} tokens before its end"
        raise ValueError(f"{problem}: lower the distance.")
    if writes > distance:
        raise ValueError(f"{writes} writes do not fit in the last {distance} tokens: raise the distance.")
    prompt = torch.arange(count).repeat_interleave(targets.shape[1])
    goal = Goal(run, prompt, targets.flatten(), length - distance, writes, write)
    return Setting(goal, ranks(_native(host, goal), goal.tokens), np.tile(labels, count))


@torch_defaults()
def _native(host: Host, goal: Goal) -> Tensor:
    """Return the native logits [R, V] at the end of the prompts."""
    return host.logits(goal.run.final[:, -1])[goal.rows]


def log_p(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability [R] of tokens [R] in logits [R, V]."""
    return F.log_softmax(logits, -1).gather(-1, tokens[:, None])[:, 0]


@torch_defaults()
def trials(
    host: Host,
    cell: Cell,
    trial: Setting,
    native: Tensor,
    *,
    magnitudes: Sequence[float],
    batch_rows: int = 512,
) -> pd.DataFrame:
    """Return one row per trial, direction and magnitude (in native write norms): ranks, inclusion, lift.

    native: the unedited continuations [prompts, count]; the edited ones are as long.
    """
    goal, rows = trial.goal, []
    before, target = log_p(_native(host, goal), goal.tokens), goal.tokens[:, None]
    included_native = (native[goal.rows] == target).any(1).int().numpy()
    for name in ONE_CELL:
        edits = directions(host, goal, [cell], name)
        for magnitude in magnitudes:
            larger = scaled(edits, torch.full((len(target),), magnitude))
            pieces = [part(larger, which) for which in torch.arange(len(target)).split(batch_rows)]
            pieces = [generate_under(host, goal.run, piece, native.shape[1]) for piece in pieces]
            tokens, logits = (torch.cat(x) for x in zip(*pieces, strict=True))
            columns = dict(magnitude=magnitude, native_rank=trial.native_rank.numpy())
            columns |= dict(edited_rank=ranks(logits, goal.tokens).numpy(), included_native=included_native)
            columns |= dict(included_edited=(tokens == target).any(1).int().numpy())
            rows.append(trial.table(name, **columns, first_step_lift=(log_p(logits, goal.tokens) - before).numpy()))
    return pd.concat(rows, ignore_index=True)


def doses(host: Host, cell: Cell, trial: Setting, *, grid: Sequence[float], bisections: int) -> pd.DataFrame:
    """Return one row per trial and direction: its dose on the grid, refined by bisection, or infinity."""
    goal, rows = trial.goal, []
    for name in ONE_CELL:
        edits = directions(host, goal, [cell], name)

        @torch_defaults()
        def succeeds(which, magnitude, edits=edits):
            logits = end_logits(host, goal.part(which), scaled(part(edits, which), magnitude))
            return logits.argmax(-1) == goal.tokens[which]

        low, high = torch.zeros(len(goal.rows)), torch.full((len(goal.rows),), torch.inf)
        for dose in map(float, sorted(grid)):
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


def refined(host: Host, goal: Goal, edits: Edits, logits: Tensor, steps: int) -> tuple[Edits, Tensor]:
    """Refine the rows whose token is not the top one of logits [R, V]; return all rows' edits and logits."""
    missed = torch.nonzero(logits.argmax(-1) != goal.tokens)[:, 0]
    if not len(missed):
        return edits, logits
    missing = goal.part(missed)
    better = refine(host, missing, part(edits, missed), steps)
    both = {}
    for cell, edit in edits.items():
        sides = (edit.left, better[cell].left), (edit.right, better[cell].right)
        left, right = (x.index_copy(0, missed, y) for x, y in sides)
        both[cell] = replace(edit, left=left, right=right)
    with torch.no_grad():
        return both, logits.index_copy(0, missed, end_logits(host, missing, better))


def kl_elsewhere(native: Tensor, edited: Tensor, tokens: Tensor) -> Tensor:
    """Return KL(native, edited) [R] in nats of the distributions [R, V] over all tokens but tokens [R]."""
    others = torch.ones_like(native, dtype=torch.bool).scatter_(1, tokens[:, None], False)
    return kl(*(x[others].view(len(x), -1) for x in (native, edited)))


@torch_defaults()
def native_losses(host: Host, run: Run, rows: Tensor, tokens: Tensor) -> Tensor:
    """Return the loss in nats of each token [R, count] after window rows[r], in the unedited model."""
    ends, embedded = torch.full_like(rows, run.tokens.shape[1]), host.embed(tokens[:, :-1].to(host.device))
    hidden, _ = host.layers_above(run, -1, rows, ends, embedded)  # all layers
    logits = torch.cat([host.logits(run.final[rows, -1:]), host.logits(hidden)], 1)
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view(tokens.shape)


@torch_defaults()
def native_continuations(host: Host, run: Run, new_tokens: int) -> Tensor:
    """Return the unedited greedy continuations [prompts, new_tokens]."""
    if new_tokens < 1:
        raise ValueError(f"There is nothing to generate: {new_tokens} tokens were asked for.")
    count, length = run.tokens.shape
    ends = torch.full((count,), length)
    pasts = [host.past_at(record, torch.arange(count), ends) for record in run.records]
    return host.decode(pasts, host.logits(run.final[:, -1]).argmax(-1), length, new_tokens - 1)
