"""Train the recall hosts of models/recall/recipes.yaml, each into models/recall/FAMILY-SIDE.

A training takes one to three minutes on one core. A host whose training.json has the same recipe is kept."""

from __future__ import annotations

import argparse
import json
import time

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm

from replication.commands import read_yaml
from replication.commands.train_host import export
from replication.study.paths import ROOT
from writesae.evaluate.recall import Task, answer_loss, answered
from writesae.hosts import load
from writesae.hosts.base import Host

FOLDER = ROOT / "models" / "recall"
CURVE_POINTS = 10


class Family(BaseModel):
    """The training of one family.

    lr, steps, first_pairs: one number, or one per side. sides: fields of the architecture that are the side
    of the state. first_pairs: per context in the first quarter of the steps (None: of the smallest load)."""

    model_config = ConfigDict(extra="forbid")
    lr: float | dict[int, float]
    steps: PositiveInt | dict[int, PositiveInt]
    sides: list[str]
    architecture: dict
    initial: dict[str, float] = {}
    first_pairs: PositiveInt | dict[int, PositiveInt] | None = None

    def at(self, side: int) -> Family:
        """Return the training at a side, with one number for lr, steps and first_pairs (or None)."""
        names = ("lr", "steps", "first_pairs")
        chosen = {name: x.get(side) for name in names if isinstance(x := getattr(self, name), dict)}
        return self.model_copy(update=chosen)


class Recipe(BaseModel):
    """The numbers of all trainings; the YAML file documents each."""

    model_config = ConfigDict(extra="forbid")
    seed: int
    keys: PositiveInt
    values: PositiveInt
    sides: list[PositiveInt]
    loads: list[float]
    queries: PositiveInt
    tokens: PositiveInt
    test_contexts: PositiveInt
    families: dict[str, Family]

    @property
    def task(self) -> Task:
        return Task(self.keys, self.values)

    def pairs(self, side: int) -> list[int]:
        """Return the pairs per context of each load."""
        return [int(load * side) for load in self.loads]


def new_host(recipe: Recipe, name: str, side: int) -> Host:
    """Return the host of a family before training."""
    family, adapter = recipe.families[name], load.adapter(name)
    sizes = dict.fromkeys(family.sides, side) | dict(vocab_size=recipe.keys + recipe.values)
    torch.manual_seed(recipe.seed)
    model = adapter.build(family.architecture | sizes)
    for parameter, value in family.initial.items():
        for key, x in model.named_parameters():
            if key.endswith(parameter):
                x.data.fill_(value)
    host = adapter(model, None, name)
    host.model.train().requires_grad_(True)
    return host


def pairs_at(recipe: Recipe, side: int, step: int, steps: int, generator: torch.Generator) -> int:
    """Return the pairs of a step: a random load, at first the smallest only, from half-way on any."""
    pairs = recipe.pairs(side)
    able = min(len(pairs), 1 + 2 * len(pairs) * step // steps)
    return pairs[int(torch.randint(able, (), generator=generator))]


def accuracies(recipe: Recipe, host: Host, side: int) -> dict[str, float]:
    """Return the share of right answers per number of pairs, on contexts that are the same at every call."""
    generator, row = torch.Generator().manual_seed(recipe.seed + 1), {}
    for pairs in recipe.pairs(side):
        contexts = recipe.task.draw(recipe.test_contexts, pairs, min(pairs, recipe.queries), generator)
        row[f"right_{pairs}"] = round(answered(host, contexts).float().mean().item(), 4)
    return row


def train(recipe: Recipe, name: str, side: int) -> tuple[Host, list[dict]]:
    """Return a trained host, and its accuracies during the training."""
    family, host = recipe.families[name].at(side), new_host(recipe, name, side)
    generator, history = torch.Generator().manual_seed(recipe.seed), []
    optimiser = torch.optim.AdamW(host.model.parameters(), lr=family.lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, family.lr, total_steps=family.steps, pct_start=0.1)
    for step in tqdm(range(1, family.steps + 1), desc=f"{name}, {side} x {side}", mininterval=10):
        pairs = pairs_at(recipe, side, step - 1, family.steps, generator)
        if family.first_pairs and step <= family.steps // 4:
            pairs = family.first_pairs
        queries = min(pairs, recipe.queries)
        contexts = recipe.task.draw(recipe.tokens // (2 * pairs + 2 * queries), pairs, queries, generator)
        optimiser.zero_grad()
        answer_loss(host, contexts).backward()
        torch.nn.utils.clip_grad_norm_(host.model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % (family.steps // CURVE_POINTS) == 0:
            history.append(dict(step=step) | accuracies(recipe, host, side))
            tqdm.write(json.dumps(history[-1]))
    return host, history


def word_tokenizer(recipe: Recipe) -> Tokenizer:
    """Return the tokenizer of the words k0, k1, ..., v0, v1, ..., between blanks."""
    words = [f"k{i}" for i in range(recipe.keys)] + [f"v{i}" for i in range(recipe.values)]
    tokenizer = Tokenizer(models.WordLevel(dict(zip(words, range(len(words)))), unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hosts", nargs="*", help="FAMILY-SIDE, such as mamba2-32; by default all of the recipe")


def main(options: argparse.Namespace) -> int:
    recipe = read_yaml(Recipe, FOLDER / "recipes.yaml", "models/recall/recipes.yaml")
    every = {f"{name}-{side}": (name, side) for side in recipe.sides for name in recipe.families}
    if unknown := [name for name in options.hosts if name not in every]:
        raise ValueError(f"The recipe has no host {unknown[0]}: choose from {', '.join(every)}.")
    for name in options.hosts or every:
        family, side = every[name]
        settings = recipe.model_dump(exclude={"families", "sides"})
        settings |= recipe.families[family].at(side).model_dump(exclude_none=True)
        record = FOLDER / name / "training.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8"))["recipe"] == settings:
            print(f"{name} is there")
            continue
        began = time.monotonic()
        host, history = train(recipe, family, side)
        fields = dict(name=f"recall-{name}", recipe=settings, seconds=round(time.monotonic() - began))
        fields |= dict(parameters=sum(x.numel() for x in host.model.parameters()), torch=torch.__version__)
        export(host.model, word_tokenizer(recipe), fields | history[-1], history, FOLDER / name)
        print(f"{name}: {json.dumps(history[-1])}")
    return 0
