"""Examine a model before work is spent on it: `python -m writesae check MODEL`, or `examine(host, windows)`.

Three questions. Does this project compute what the library's model computes, and what does the library do
with padding, packing and caches (COMPARISONS)? Which cells are worth an SAE: how long do they remember, how
near are their states and writes to rank 1, what do missing writes cost? What will harvest and training take?
"""

from __future__ import annotations

import copy
import inspect
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from writesae.edit import edited_hidden, head_change, kl, make_edit
from writesae.evaluate.cells import cost_of_deletions, cost_of_no_writes, state_reads, survey_cells
from writesae.files import local_path, said, write_atomically
from writesae.harvesting import harvest, harvest_bytes
from writesae.hosts.base import Host, Run
from writesae.hosts.layers import PlainCausalLM
from writesae.hosts.load import KERNEL_PACKAGES
from writesae.recurrence import torch_defaults
from writesae.sae.train import TrainingSettings, sae_bytes, train
from writesae.shift import logit_gradients
from writesae.text import Windows

FIRST = 16  # first position of edits, so that the state has some history
SHORTEST = 64  # tokens of a window
DECODED = 24  # tokens that are run one by one
PADS = 7
PLACES = 32  # deletions per cell
LISTED = 16  # cells in the printed table
SECONDS = 40.0  # for the table of cells; sets how many cells are examined
TRAINING = dict(n_atoms=2048, k=32, batch_windows=1)  # the paper's
STEPS = 8  # of the trial training
LARGEST_COPY = 2e9  # parameters of a model that is copied to another dtype
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
# in fp64 the library's own recurrences are in fp32
CACHE = "its cache is not safe without position_ids: pass them, or run whole windows"


class NotAsked(Exception):
    """The class of the model has nothing to compare; the message says why."""


class Comparison(NamedTuple):
    """Two computations of the same numbers. whose: "ours" or "library": who is wrong if they differ."""

    measure: Callable[[Host, Run], float]
    whose: str
    what: str
    if_off: str


COMPARISONS: dict[str, Comparison] = {}  # in the order of their definitions


def compares(name: str, whose: str, what: str, if_off: str) -> Callable:
    """Return a decorator that puts a function from host and run to a relative error into COMPARISONS."""

    def enter(measure: Callable[[Host, Run], float]) -> Callable:
        COMPARISONS[name] = Comparison(measure, whose, what, if_off)
        return measure

    return enter


def miss(actual: Tensor, expected: Tensor) -> float:
    """Return ||actual - expected|| / ||expected||."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    return float((actual - expected).norm() / expected.norm())


def library(host: Host, tokens: Tensor, **options):
    """Return what the library's own forward returns. Raises NotAsked if it does not take an option."""
    taken = inspect.signature(type(host.model).forward).parameters.values()
    names = {parameter.name for parameter in taken}
    lacking = [name for name in options if name not in names]
    if lacking and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        raise NotAsked(f"its forward takes no {lacking[0]}")
    options = {name: x.to(host.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    with torch.no_grad():
        return host.model(input_ids=tokens.to(host.device), **options)


def plain(host: Host, tokens: Tensor) -> Tensor:
    """Return the library's logits [B, T, V] of whole windows."""
    return library(host, tokens, use_cache=False).logits


@compares("whole sequence", "ours", "our logits, and the library's", "do not use this model: report it")
def against_library(host: Host, run: Run) -> float:
    return miss(host.logits(run.final), plain(host, run.tokens))


@compares("token by token", "ours", "our run by single tokens, and the whole", "do not generate with edits")
def token_by_token(host: Host, run: Run) -> float:
    tokens, rows = run.tokens[:, :DECODED], torch.arange(len(run.tokens))
    pasts = [host.past_at(record, rows, torch.zeros_like(rows)) for record in run.records]
    steps = [host.step(pasts, now, position) for position, now in enumerate(tokens.unbind(1))]
    return miss(torch.stack(steps, 1), run.final[:, : tokens.shape[1]])


def some(host: Host, count: int) -> list[tuple[int, int]]:
    """Return at most `count` cells, evenly spaced over layers and heads."""
    numbers = np.linspace(0, len(host.cells) - 1, min(count, len(host.cells))).round().astype(int)
    return [host.cells[number] for number in numbers]


@compares(
    "fp64 loop", "ours", "reads of the state, and those of a step loop in fp64", "do not trust factors of this model"
)
def against_loop(host: Host, run: Run) -> float:
    misses = []
    for layer, head in some(host, 8):
        factors = host.factors(run, layer, head).at(slice(0, 1)).map(Tensor.double)
        reads = [query @ state for query, (state, _) in zip(factors.query.split(1, 1), factors.walk())]
        misses.append(miss(state_reads(run.records[layer], head)[:1], torch.cat(reads, 1)))
    return max(misses)


@compares("restart", "ours", "our run from the middle of a window, and the whole", "do not trust edits")
def restart(host: Host, run: Run) -> float:
    layer, middle = host.recurrent_layers[0], run.tokens.shape[1] // 2
    at, steps = (torch.tensor([0]), torch.tensor([middle])), run.tokens.shape[1] - middle
    final, _ = host.branch(run, layer, 0, *at, torch.zeros(1, steps, host.d_v))
    return miss(final, run.final[:1, middle:])


@compares("deletion", "ours", "a write taken out, and an fp64 loop without it", "do not trust edits")
def deletion_by_loop(host: Host, run: Run) -> float:
    misses, at, steps = [], FIRST, min(32, run.tokens.shape[1] - FIRST)
    for layer, head in some(host, 8):
        native = host.factors(run, layer, head).at(slice(0, 1))
        edit = make_edit(*torch.tensor([[0], [at]]), native.key[:, at, None], -native.added[:, at, None])
        changed, _ = head_change(native, edit, steps)
        native = native.at(slice(None), slice(at + steps)).map(Tensor.double)
        without = native.map(Tensor.clone)
        without.added[:, at] = 0
        states = ((x, y) for (x, _), (y, _) in zip(without.walk(), native.walk()))
        reads = [query @ (x - y) for query, (x, y) in zip(native.query.split(1, 1), states)]
        misses.append(miss(changed, torch.cat(reads, 1)[:, at:]))
    return max(misses)


@compares("batch", "ours", "a window in a batch, and alone", "run windows one by one")
def rows_alone(host: Host, run: Run) -> float:
    return miss(host.run(run.tokens[-1:]).final, run.final[-1:])


def cached(host: Host, run: Run, sizes: list[int]) -> float:
    """Compare the library's logits of parts of a window, one by one through its cache, with the whole."""
    if isinstance(host.model, PlainCausalLM):
        raise NotAsked("the class has no cache")
    tokens, parts, cache = run.tokens[:1, : sum(sizes)], [], {}
    for part in tokens.split(sizes, 1):
        output = library(host, part, use_cache=True, **cache)
        parts.append(output.logits)
        cache = {name: output[name] for name in ("past_key_values", "cache_params") if name in output}
    return miss(torch.cat(parts, 1), plain(host, tokens))


@compares("cache in parts", "library", "half a window after its other half by the cache, and the whole", CACHE)
def cache_in_parts(host: Host, run: Run) -> float:
    half = run.tokens.shape[1] // 2
    return cached(host, run, [half, run.tokens.shape[1] - half])


@compares("cache by token", "library", "single tokens by the cache, and the whole", CACHE)
def cache_by_token(host: Host, run: Run) -> float:
    return cached(host, run, [DECODED] + [1] * min(DECODED, run.tokens.shape[1] - DECODED))


def padded(host: Host, tokens: Tensor, left: bool, beside: Tensor | None = None) -> float:
    """Compare the logits of one window tokens [1, T] with and without padding; beside: a longer window."""
    pads = torch.zeros(1, PADS, dtype=torch.int64)
    row = torch.cat([pads, tokens] if left else [tokens, pads], 1)
    mask = torch.cat([pads, torch.ones_like(tokens)] if left else [torch.ones_like(tokens), pads], 1)
    if beside is not None:
        row, mask = torch.cat([row, beside]), torch.cat([mask, torch.ones_like(beside)])
    logits = library(host, row, attention_mask=mask, use_cache=False).logits[:1]
    return miss(logits[:, PADS:] if left else logits[:, :-PADS], plain(host, tokens))


@compares(
    "left padding", "library", "a window padded on the left beside a longer one, and alone", "do not pad on the left"
)
def left_padding(host: Host, run: Run) -> float:
    return padded(host, run.tokens[:1, PADS:], left=True, beside=run.tokens[-1:])


@compares("left padding alone", "library", "the same without another window", "do not pad a single window")
def left_padding_alone(host: Host, run: Run) -> float:
    return padded(host, run.tokens[:1, PADS:], left=True)


@compares("right padding", "library", "a window padded on the right, and alone", "do not pad on the right")
def right_padding(host: Host, run: Run) -> float:
    return padded(host, run.tokens[:1, PADS:], left=False, beside=run.tokens[-1:])


@compares(
    "packing",
    "library",
    "a text after another one in a window, and alone",
    "its state carries over: one text per window, as in cut_windows",
)
def packing(host: Host, run: Run) -> float:
    """Compare a text's logits after another text in a window, with positions that begin anew, and alone."""
    first, second = run.tokens[:1], run.tokens[-1:, PADS:]
    packed, places = torch.cat([first, second], 1), [torch.arange(x.shape[1]) for x in (first, second)]
    try:
        output = library(host, packed, position_ids=torch.cat(places)[None], use_cache=False)
    except NotAsked:
        output = library(host, packed, use_cache=False)
    return miss(output.logits[:, first.shape[1] :], plain(host, second))


def compare(host: Host, run: Run) -> pd.DataFrame:
    """Return one row per entry of COMPARISONS: comparison, whose, what, error (relative), verdict, note.

    verdict: "agrees", "differs" (the error is above TOLERANCE for the model's dtype), "fails" (the library
    raises the error in the note), or "not asked" with the reason as note.
    """
    rows, limit = [], TOLERANCE[host.model.dtype]
    for name, (measure, whose, what, if_off) in COMPARISONS.items():
        try:
            error = measure(host, run)
            verdict, note = ("agrees", "") if error <= limit else ("differs", if_off)
        except NotAsked as reason:
            error, verdict, note = None, "not asked", str(reason)
        except Exception as problem:  # a library raises what it likes; an error of ours is not caught
            if whose == "ours":
                raise
            error, verdict, note = None, "fails", said(problem)
        rows.append((name, whose, what, error, verdict, note))
    return pd.DataFrame(rows, columns=["comparison", "whose", "what", "error", "verdict", "note"])


def places(run: Run, count: int) -> tuple[Tensor, Tensor]:
    """Draw rows and positions [count] of edits whose next token is in the window."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(run.tokens), (count,), generator=generator)
    return rows, torch.randint(FIRST, run.tokens.shape[1] - 1, (count,), generator=generator)


def examine_cells(host: Host, run: Run, cells: list[tuple[int, int]]) -> pd.DataFrame:
    """Return one row per cell: layer, head, the measures of `survey_cells`, the cost of its writes in nats.

    deletion_median, deletion_mean: KL at the next token without one write, over PLACES places, the same in
    all cells. no_writes: the increase of the loss per token if nothing is ever written.
    """
    by = ["layer", "head"]
    table = survey_cells(host, run, FIRST, cells)
    deleted = cost_of_deletions(host, run, cells, *places(run, PLACES)).groupby(by).kl
    deleted = deleted.agg(deletion_median="median", deletion_mean="mean").reset_index()
    costs = cost_of_no_writes(host, run, cells).groupby(by).cost.mean().rename("no_writes").reset_index()
    return table.merge(deleted, on=by).merge(costs, on=by).drop(columns=["host", "n_tokens"])


def as_many_cells_as_time(host: Host, run: Run) -> list[tuple[int, int]]:
    """Return evenly spaced cells whose examination takes about SECONDS, at least four."""
    began = time.monotonic()
    examine_cells(host, run, some(host, 1))
    return some(host, max(4, int(SECONDS / (time.monotonic() - began))))


def rounding(host: Host, run: Run) -> float | None:
    """Return the median KL in nats from the host's logits to those of a copy in bfloat16.

    A host in bfloat16 is compared with a copy in fp32. None for a model of more than LARGEST_COPY parameters.
    """
    if host.model.num_parameters() > LARGEST_COPY:
        return None
    dtype = torch.float32 if host.model.dtype == torch.bfloat16 else torch.bfloat16
    other = type(host)(copy.deepcopy(host.model).to(dtype), None, host.name)
    return float(kl(host.logits(run.final), other.logits(other.run(run.tokens).final)).median())


def closed_form(host: Host, run: Run, cell: tuple[int, int]) -> float:
    """Return R^2 of shifts of the top token's logit at t + 1, through the layer, under deletions at t."""
    (rows, at), (layer, head) = places(run, PLACES), cell
    write, native = host.factors(run, layer, head).at(rows, at), host.logits(run.final[rows, at + 1])
    edit = make_edit(rows, at, write.key[:, None], -write.added[:, None])
    token = native.argmax(-1, keepdim=True)
    change, _ = head_change(host.factors(run, layer, head), edit, 2)
    slopes = logit_gradients(host, run, layer, head, rows, at, 2, token)
    edited = host.edited_layer(run, layer, head, rows, at, change)[0]
    shift = (host.logits(edited_hidden(host, run, layer, head, edit, 2)[:, -1]) - native).gather(-1, token)
    residual = shift - slopes.through_layer(edited).cpu()
    return float(1 - residual.square().mean() / shift.var(correction=0))


def describe(host: Host, run: Run) -> dict:
    """Return what the host is, as plain values."""
    model = host.model
    kernels = [name for name in KERNEL_PACKAGES if find_spec(name)] if host.device.type == "cuda" else []
    values = dict(model=host.name, model_class=type(model).__name__, family=host.family)
    plain_torch = isinstance(model, PlainCausalLM)
    values["library"] = "this project's model, in plain PyTorch" if plain_torch else "transformers"
    values |= dict(kernels=kernels, parameters=model.num_parameters())
    values |= dict(dtype=str(model.dtype).removeprefix("torch."), device=str(host.device))
    values |= dict(layers=host.layers, recurrent_layers=len(host.recurrent_layers), heads=host.heads)
    values |= dict(d_k=host.d_k, d_v=host.d_v)
    values["decay"] = "one per head" if host.scalar_decay else "one per channel"
    return values | dict(windows=len(run.tokens), window=run.tokens.shape[1])


def estimate(host: Host, tokens: Tensor) -> dict:
    """Return seconds and bytes of a harvest and of a training, per million tokens, from a small measurement.

    The harvest is of one cell of the last recurrent layer (cells share the pass of the model). The training
    is STEPS steps of the paper's size; its bytes are of weights, gradients and Adam, not of the history.
    """
    layer, million = host.recurrent_layers[-1], 1e6
    began = time.monotonic()
    factors = harvest(host, tokens, layer=layer, head=0, batch=len(tokens), progress=False)
    seconds = (time.monotonic() - began) * million / tokens.numel()
    settings = TrainingSettings(**TRAINING, tokens=STEPS * tokens.shape[1])
    shape = type(host).shape(host.model.config)
    numbers = dict(harvest_seconds=seconds, harvest_bytes=harvest_bytes(shape, int(million)))
    numbers["model_bytes"] = sum(p.nbytes for p in host.model.parameters())
    numbers["training_bytes"] = 4 * sae_bytes(host.d_k, host.d_v, settings)
    for target in ("write", "state"):
        _, record = train(factors.history(target), settings, progress=False)
        numbers[f"training_seconds_{target}"] = record.seconds * million / record.tokens
    return numbers


@dataclass
class Examination:
    """The results of `examine`: tables of `compare` and `examine_cells`, and plain values."""

    model: dict
    comparisons: pd.DataFrame
    cells: pd.DataFrame
    estimates: dict

    @property
    def passed(self) -> bool:
        """Whether this project computes what the library's model computes."""
        return not ((self.comparisons.whose == "ours") & (self.comparisons.verdict == "differs")).any()

    def __str__(self) -> str:
        return "\n\n".join([_about(self.model), _compared(self.comparisons), _worth(self), _effort(self)])

    def save(self, folder: Path | str) -> list[Path]:
        """Write check.json, and check.png where matplotlib is installed; return what was written."""
        folder = local_path(folder)
        tables = dict(comparisons=self.comparisons, cells=self.cells)
        tables = {name: json.loads(table.to_json(orient="records")) for name, table in tables.items()}
        text = json.dumps(dict(model=self.model, estimates=self.estimates) | tables, indent=1) + "\n"
        write_atomically(folder / "check.json", lambda partial: partial.write_text(text, encoding="utf-8"))
        if not find_spec("matplotlib"):
            return [folder / "check.json"]
        write_atomically(folder / "check.png", lambda partial: draw(self).savefig(partial, format="png", dpi=200))
        return [folder / "check.json", folder / "check.png"]


@torch_defaults()
def examine(host: Host, windows: Windows | Tensor, cells: int | None = None) -> Examination:
    """Examine a host on a few windows, or their tokens [N, T], of text such as it will read.

    cells: the number of cells in the table, evenly spaced; by default as many as fit into about a minute.
    Raises ValueError for windows below 64 tokens, no cells, and as `Host.run`.
    """
    tokens = host.check_windows(windows)
    if tokens.shape[-1] < SHORTEST:
        raise ValueError(f"A check takes windows of at least {SHORTEST} tokens, and these have {tokens.shape[-1]}.")
    if cells is not None and cells < 1:
        raise ValueError(f"A check takes at least one cell, not {cells}.")
    run = host.run(tokens)
    chosen = as_many_cells_as_time(host, run) if cells is None else some(host, cells)
    table, model = examine_cells(host, run, chosen), describe(host, run)
    cell = tuple(table.loc[table.deletion_mean.idxmax(), ["layer", "head"]].astype(int))
    model |= dict(closed_form_cell=list(map(int, cell)), closed_form_r2=closed_form(host, run, cell))
    model["bfloat16_kl"] = rounding(host, run)
    return Examination(model, compare(host, run), table, estimate(host, tokens))


def _about(model: dict) -> str:
    kernels = ", ".join(model["kernels"]) or "none (plain PyTorch)"
    lines = [
        f"{model['model']}: {model['model_class']} ({model['family']}), {model['parameters'] / 1e6:,.1f} "
        f"million parameters, {model['dtype']} on {model['device']}; kernels: {kernels}",
        f"{model['recurrent_layers']} of {model['layers']} layers are recurrent, with {model['heads']} heads; states "
        f"are {model['d_k']} x {model['d_v']} (key x value) and decay by {model['decay'].replace('one', 'one factor')}",
    ]
    if model["decay"] == "one per channel":
        lines.append("SAEs of writes train without states; SAEs of states rebuild them for a few windows at a time")
    else:
        lines.append("SAEs of writes and of states train without ever forming a state")
    return "\n".join(lines)


def _compared(comparisons: pd.DataFrame) -> str:
    verdicts = [": ".join(filter(None, pair)) for pair in zip(comparisons.verdict, comparisons.note, strict=True)]
    errors = comparisons.error.map("{:.0e}".format, na_action="ignore").fillna("-")
    shown, parts = comparisons.assign(error=errors, verdict=verdicts), []
    titles = dict(ours="This project against the model", library="The library against itself")
    for whose, title in titles.items():
        part = shown[shown.whose == whose][["comparison", "what", "error", "verdict"]].rename(columns=dict(what="of"))
        parts.append(f"{title} (relative error)\n{_left(part)}")
    return "\n\n".join(parts)


def _left(table: pd.DataFrame) -> str:
    """Return a table as text, with columns of text to the left."""
    cells = table.astype(str)
    widths = {name: max(len(name), cells[name].str.len().max()) for name in cells}
    rows = [dict(zip(cells, cells, strict=True)), *cells.to_dict("records")]
    return "\n".join("  ".join(f"{row[name]:<{width}}" for name, width in widths.items()).rstrip() for row in rows)


def _worth(examination: Examination) -> str:
    """Return the table of cells, sorted by the increase of the loss without the cell's writes."""
    model, cells = examination.model, examination.cells.sort_values("no_writes", ascending=False)
    columns = {"cell": [f"L{layer} H{head}" for layer, head in zip(cells.layer, cells["head"], strict=True)]}
    columns |= {"half-life": cells.half_life_median.map("{:.1f}".format)}
    columns |= {"sigma1/sigma2": cells.sigma1_over_sigma2.map("{:.2f}".format)}
    columns |= {"rank of write": cells.effective_write_rank}
    for name in ("median", "mean"):
        columns[f"deletion, {name}"] = (1000 * cells[f"deletion_{name}"]).map("{:.2g}".format)
    columns["no writes"] = (1000 * cells.no_writes).map("{:+.1f}".format)
    count = model["recurrent_layers"] * model["heads"]
    title = (
        f"{len(cells)} of {count} cells, on {model['windows']} windows of {model['window']} tokens. Half-life in "
        f"tokens; millinats per token: KL at the next token without one write ({PLACES} places), and the "
        "loss without any write of the cell"
    )
    lines = [title, _left(pd.DataFrame(columns).head(LISTED))]
    if len(cells) > LISTED:
        lines.append(f"({len(cells) - LISTED} further cells are in check.json, with --out)")
    rounded = model["bfloat16_kl"]
    if rounded is not None:
        small = (cells.deletion_median < rounded).mean()
        lines.append(
            f"In bfloat16 the logits differ by a KL of {1000 * rounded:.3f} millinats (median): more than "
            f"the median deletion does in {small:.0%} of these cells"
        )
    layer, head = model["closed_form_cell"]
    lines.append(
        f"In L{layer} H{head}, where a deletion changes most, the closed form through the layer predicts the "
        f"shifts of the top logits with R2 {model['closed_form_r2']:.2f}"
    )
    return "\n".join(lines)


def _effort(examination: Examination) -> str:
    numbers, model = examination.estimates, examination.model
    trained = [f"{_duration(numbers[f'training_seconds_{target}'])} on {target}s" for target in ("write", "state")]
    harvest, size, sae = (numbers[f"{name}_bytes"] / 1e9 for name in ("harvest", "model", "training"))
    return (
        f"Estimates per million tokens, from {model['windows']} windows and {STEPS} training steps:\n"
        f"harvest of one cell or more: {_duration(numbers['harvest_seconds'])}, and {harvest:.2f} GB per "
        f"cell; the model takes {size:.2f} GB\n"
        f"training of an SAE with {TRAINING['n_atoms']:,} atoms, k = {TRAINING['k']}: "
        f"{' and '.join(trained)}; it takes {sae:.2f} GB and the harvest"
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def draw(examination: Examination):
    """Return a matplotlib figure: cells by half-life and by a deletion's cost, errors of the comparisons."""
    from matplotlib.figure import Figure

    cells, asked = examination.cells, examination.comparisons.dropna(subset="error")
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    points = left.scatter(cells.half_life_median, 1000 * cells.deletion_mean, c=cells.layer, cmap="viridis", s=24)
    left.set(xscale="log", yscale="log", xlabel="half-life (tokens)", ylabel="KL without one write (millinats)")
    left.set_title(f"What a write is worth, {len(cells)} cells", fontsize=9)
    figure.colorbar(points, ax=left, label="layer")
    colours = asked.verdict.map({"agrees": "#029e73", "differs": "#d55e00"})
    right.barh(asked.comparison, asked.error.clip(lower=1e-17), color=colours, height=0.6)
    right.axvline(TOLERANCE[getattr(torch, examination.model["dtype"])], color="0.4", linestyle=":")
    right.set(xscale="log", xlabel="relative error (dotted: the limit)")
    right.invert_yaxis()
    right.set_title("Agreement with the library", fontsize=9)
    for axes in (left, right):
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
