"""Train an embedded host from models/NAME/recipe.yaml, on the installed corpus.

An interrupted training continues from the last checkpoint, below build/hosts/NAME, if recipe and text are the
same. The result is in models/NAME: fp16 weights, config, tokenizer, and training.csv, the loss curve."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from tokenizers import Tokenizer
from tqdm import tqdm

from replication.commands import read_yaml
from replication.study import docstrings
from replication.study.fingerprint import fingerprint
from replication.study.paths import output_root, typed
from writesae.files import read_pickle, reading, write_atomically
from writesae.hosts import load


class Recipe(BaseModel):
    """The numbers of one host's training; the YAML file documents each."""

    model_config = ConfigDict(extra="forbid")
    family: str
    seed: int
    vocabulary: int = Field(ge=512, le=65536)
    context: int = Field(ge=16)
    architecture: dict
    batch: PositiveInt
    at_once: PositiveInt
    through: Literal["library", "adapter"] = "library"
    steps: PositiveInt
    warmup: NonNegativeInt
    decay_from: NonNegativeInt
    matrix_lr: float
    other_lr: float
    decay_lr: float
    weight_decay: float
    compile: bool = False
    evaluate_every: PositiveInt

    def learning_rate(self, step: int) -> float:
        """Return the factor on all learning rates: linear warm-up, constant, linear decay to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return warm * min(1.0, (self.steps - step) / max(1, self.steps - self.decay_from))


class Muon(torch.optim.Optimizer):
    """Gradient descent with orthogonalised momentum (Jordan et al. 2024), computed in the parameters' dtype.

    torch.optim.Muon computes in bfloat16, which takes minutes per step on CPUs that only emulate it."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @staticmethod
    def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
        """Return matrices [count, rows, columns] after five Newton-Schulz steps: singular values near 1."""
        tall = matrices.shape[1] > matrices.shape[2]
        x = matrices.mT if tall else matrices
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x.mT if tall else x

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, same in by_shape.items():
                for p in same:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                blended = [p.grad.lerp(self.state[p]["momentum"], group["momentum"]) for p in same]
                for p, update in zip(same, self.orthogonal(torch.stack(blended)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update, alpha=-group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)


def optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices (both sides at least 32), and AdamW for all other parameters.

    Parameters of the decays have their own learning rate: with that of the other vectors, half-lives decrease
    from tens of tokens to less than one."""
    matrices, decays, others = [], [], []
    for name, p in model.named_parameters():
        if any(part in load.adapter(recipe.family).decay_parameters for part in name.split(".")):
            decays.append(p)
        elif ".layers." in name and p.ndim == 2 and min(p.shape) >= 32:
            matrices.append(p)
        else:
            others.append(p)
    muon = Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay)
    groups = [dict(params=others), dict(params=decays, lr=recipe.decay_lr)]
    adam = torch.optim.AdamW(groups, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0)
    for group in muon.param_groups + adam.param_groups:
        group["base_lr"] = group["lr"]
    return [muon, adam]


def stream(tokenizer: Tokenizer, split: str) -> torch.Tensor:
    """Return the tokens of a split as an int64 vector, with an end-of-text token (0) before each passage."""
    tokenizer.encode_special_tokens = True  # what spells <|endoftext|> in a text is text
    return torch.cat([torch.tensor([0, *e.ids]) for e in tokenizer.encode_batch(docstrings.texts(split))])


def batch_at(tokens: torch.Tensor, recipe: Recipe, step: int) -> torch.Tensor:
    """Return windows [batch, context] at random places that depend on seed and step alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - recipe.context, (recipe.batch,), generator=generator)
    return torch.stack([tokens[s : s + recipe.context] for s in starts])


def loss_function(model, recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function from tokens [batch, context] to the mean next-token loss in nats, by the model's
    forward or, where that is slow on a CPU, by our adapter."""
    if recipe.through == "library":
        return lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss
    host = load.adapter(recipe.family)(model, None, recipe.family)
    model.train().requires_grad_(True)  # an adapter freezes its model
    return host.loss


def accumulate(loss_of: Callable, tokens: torch.Tensor, at_once: int) -> float:
    """Add the gradient of the mean loss over tokens [batch, context], in pieces. Return the loss."""
    pieces, total = tokens.split(at_once), 0.0
    for piece in pieces:
        loss = loss_of(piece) * (len(piece) / len(tokens))
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def heldout_loss(loss_of: Callable, tokens: torch.Tensor, context: int, windows: int = 192) -> float:
    """Return the mean loss over the first `windows` whole windows of a token stream."""
    rows = tokens[: min(windows, len(tokens) // context) * context].view(-1, context)
    losses = [loss_of(chunk).item() for chunk in rows.split(16)]
    return sum(losses) / len(losses)


def export(model, tokenizer: Tokenizer, record: dict, history: list[dict], folder: Path, special="") -> None:
    """Write weights in fp16, config, tokenizer, curve and record. special: the token at ends of texts."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tied = model.config.tie_word_embeddings
    half = {k: v.half() for k, v in model.state_dict().items() if k != "lm_head.weight" or not tied}
    model.save_pretrained(folder, state_dict=half, safe_serialization=True)
    named = dict.fromkeys(("eos_token", "bos_token", "pad_token"), special) if special else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    pd.DataFrame(history).to_csv(folder / "training.csv", index=False, lineterminator="\r\n")
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_recipe(path: Path) -> Recipe:
    """Return the recipe in a YAML file. Raises ValueError if the file is missing or a field is wrong."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: a host is trained from a folder with a recipe.yaml.")
    return read_yaml(Recipe, path, str(path))


class Training:
    """The state of a training, from a checkpoint if there is one."""

    def __init__(self, recipe: Recipe, checkpoint: Path):
        architecture = recipe.architecture | {"vocab_size": recipe.vocabulary}
        self.recipe, self.checkpoint = recipe, checkpoint
        self.model = load.adapter(recipe.family).build(architecture).train()
        self.optimizers = optimizers(self.model, recipe)
        self.start, self.history, seconds = 0, [], 0.0
        if checkpoint.exists():
            saved = read_pickle(checkpoint)
            self.model.load_state_dict(saved["model"])
            for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                optimizer.load_state_dict(state)
            self.start, self.history, seconds = saved["step"], saved["history"], saved["seconds"]
        self.loss = loss_function(self.model, recipe)
        load.adapter(recipe.family).before_training(self.model)
        self.compiled = torch.compile(self.loss) if recipe.compile else self.loss
        self.began = time.monotonic() - seconds

    def step(self, tokens: torch.Tensor, number: int) -> float:
        """Take one step on tokens [batch, context]. Return the loss before it."""
        loss = accumulate(self.compiled, tokens, self.recipe.at_once)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * self.recipe.learning_rate(number)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def evaluate(self, tokens: torch.Tensor, done: int, training_loss: float) -> dict:
        """Add a row to the loss curve after `done` steps, and write the checkpoint. Return the row."""
        heldout, seconds = heldout_loss(self.loss, tokens, self.recipe.context), time.monotonic() - self.began
        row = dict(step=done, tokens=done * self.recipe.batch * self.recipe.context, seconds=round(seconds))
        row |= dict(training_loss=round(training_loss, 4), heldout_loss=round(heldout, 4))
        self.history.append(row)
        state = dict(model=self.model.state_dict(), optimizers=[o.state_dict() for o in self.optimizers])
        state |= dict(step=done, history=self.history, seconds=seconds)
        write_atomically(self.checkpoint, lambda path: torch.save(state, path))
        return row


def train(folder: Path, build: Path) -> float:
    """Train the host of a folder, or continue if recipe and text are the same. Return its held-out loss in
    nats per token.

    Raises ValueError as `read_recipe` does, FloatingPointError if the loss is not finite."""
    recipe = read_recipe(folder / "recipe.yaml")
    build = build / fingerprint(recipe=recipe, text=docstrings.identity())[:8]
    build.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer_file = build / "tokenizer.json"
    if not tokenizer_file.exists():
        trained = docstrings.train_tokenizer(docstrings.texts("host"), recipe.vocabulary)
        write_atomically(tokenizer_file, lambda path: trained.save(str(path)))
    with reading(str(tokenizer_file), "remove it to train it again"):
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokens, heldout = (stream(tokenizer, split) for split in ("host", "heldout"))
    training, running = Training(recipe, build / "checkpoint.pt"), math.nan
    steps = range(training.start, recipe.steps)
    bar = tqdm(steps, initial=training.start, total=recipe.steps, desc=folder.name, mininterval=10)
    for number in bar:
        loss = training.step(batch_at(tokens, recipe, number), number)
        running = loss if math.isnan(running) else 0.95 * running + 0.05 * loss
        if not math.isfinite(running):
            message = f"The loss of {folder.name} is not finite at step {number}: lower matrix_lr in its recipe."
            raise FloatingPointError(message)
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        done = number + 1
        if done % recipe.evaluate_every == 0 or done == recipe.steps:
            tqdm.write(json.dumps(training.evaluate(heldout, done, running)))
    record = dict(parameters=sum(p.numel() for p in training.model.parameters()))
    record |= dict(tokens=recipe.steps * recipe.batch * recipe.context, corpus_tokens=len(tokens))
    record |= dict(heldout_loss=training.history[-1]["heldout_loss"])
    record |= dict(seconds=round(time.monotonic() - training.began), threads=torch.get_num_threads())
    record["torch"] = torch.__version__
    export(training.model, tokenizer, record, training.history, folder, docstrings.END_OF_TEXT)
    docstrings.write_manifest(folder / "corpus.json")
    return record["heldout_loss"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=typed, help="models/NAME with a recipe.yaml")


def main(options: argparse.Namespace) -> int:
    for folder in options.folders:
        loss = train(folder, output_root() / "build" / "hosts" / folder.name)
        print(f"{folder}: held-out loss {loss:.3f} nats per token")
    return 0
