"""Train an embedded host from its recipe, on the installed corpus: `python -m replication.commands.train_host models/NAME`.

The recipe (models/NAME/recipe.yaml) holds every number. Progress is kept in build/hosts/NAME: kill the process at any
moment, start it again, and it goes on from the last checkpoint. At the end models/NAME holds weights (fp16
safetensors), config, tokenizer, and training.csv, the loss curve.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tqdm import tqdm

from replication.study import docstrings
from writesae.files import write_atomically
from writesae.hosts import load


class Recipe(BaseModel):
    """The numbers of one host's training; the YAML file documents each."""

    model_config = ConfigDict(extra="forbid")
    family: str
    seed: int
    vocabulary: int = Field(ge=512, le=65536)
    context: int = Field(ge=16)
    architecture: dict
    batch: int = Field(ge=1)
    at_once: int = Field(ge=1)
    through: Literal["library", "adapter"] = "library"
    steps: int = Field(ge=1)
    warmup: int = Field(ge=0)
    decay_from: int = Field(ge=0)
    matrix_lr: float
    other_lr: float
    decay_lr: float
    weight_decay: float
    compile: bool = False
    evaluate_every: int = Field(ge=1)

    def learning_rate(self, step: int) -> float:
        """The factor on both learning rates: linear warm-up, constant, linear decay to zero."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        return warm * min(1.0, (self.steps - step) / max(1, self.steps - self.decay_from))


class Muon(torch.optim.Optimizer):
    """Momentum whose step is the nearest orthogonal matrix (Jordan et al. 2024), in the parameters' own precision.

    torch.optim.Muon iterates in bfloat16, which takes minutes a step on a CPU without bfloat16 instructions.
    """

    def __init__(self, params, lr: float, weight_decay: float = 0.0, momentum: float = 0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @staticmethod
    def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
        """[count, rows, columns] with all singular values brought near 1 by five Newton-Schulz steps."""
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
    """Muon for the matrices inside the layers whose sides are both 32 or more; AdamW for all else.

    What sets a head's decay learns at a rate of its own: at the rate of the other vectors, heads that start with a
    half-life of tens of tokens end below one.
    """
    matrices, decays, others = [], [], []
    for name, p in model.named_parameters():
        if any(part in load.adapter(recipe.family).decay_parameters for part in name.split(".")):
            decays.append(p)
        elif ".layers." in name and p.ndim == 2 and min(p.shape) >= 32:
            matrices.append(p)
        else:
            others.append(p)
    slow = dict(params=decays, lr=recipe.decay_lr)
    made = [
        Muon(matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW([dict(params=others), slow], lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for optimizer in made:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return made


def stream(tokenizer, split: str, cache: Path) -> torch.Tensor:
    """All tokens of a split as one int64 vector, each passage behind an end-of-text token (the id 0)."""
    if not cache.exists():
        encoded = tokenizer.encode_batch(docstrings.texts(split))
        tokens = np.concatenate([np.array([0, *e.ids], dtype=np.uint16) for e in encoded])
        write_atomically(cache, lambda path: np.save(path, tokens))
    return torch.from_numpy(np.load(cache).astype(np.int64))


def batch_at(tokens: torch.Tensor, recipe: Recipe, step: int) -> torch.Tensor:
    """[batch, context] windows at random places; the places follow from seed and step alone."""
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
    starts = torch.randint(len(tokens) - recipe.context, (recipe.batch,), generator=generator)
    return torch.stack([tokens[s : s + recipe.context] for s in starts])


def loss_function(model, recipe: Recipe) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean next-token loss in nats over [batch, context] tokens: through the model's own forward, or, where that is slow
    on a CPU, through our adapter, which is tested against it."""
    if recipe.through == "library":
        return lambda tokens: model(input_ids=tokens, labels=tokens, use_cache=False).loss
    host = load.adapter(recipe.family)(model, None, recipe.family)
    model.train().requires_grad_(True)  # an adapter freezes its model
    return host.loss


def accumulate(loss_of, tokens: torch.Tensor, at_once: int) -> float:
    """Add the gradient of the mean loss over [batch, context] tokens, `at_once` windows at a time; the loss."""
    pieces, total = tokens.split(at_once), 0.0
    for piece in pieces:
        loss = loss_of(piece) * (len(piece) / len(tokens))
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def heldout_loss(loss_of, tokens: torch.Tensor, context: int, windows: int = 192) -> float:
    """Mean loss over the first `windows` whole windows of a token stream."""
    rows = tokens[: min(windows, len(tokens) // context) * context].view(-1, context)
    losses = [loss_of(chunk).item() for chunk in rows.split(16)]
    return sum(losses) / len(losses)


def export(model, tokenizer, recipe: Recipe, record: dict, history: list[dict], folder: Path) -> None:
    """Weights in fp16, config, tokenizer, manifest of the text, loss curve and record into `folder`."""
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    half = {
        k: v.half()
        for k, v in model.state_dict().items()
        if k != "lm_head.weight" or not model.config.tie_word_embeddings
    }
    model.save_pretrained(folder, state_dict=half, safe_serialization=True)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=docstrings.END_OF_TEXT,
        bos_token=docstrings.END_OF_TEXT,
        pad_token=docstrings.END_OF_TEXT,
    ).save_pretrained(folder)
    docstrings.write_manifest(folder / "corpus.json")
    with open(folder / "training.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]))
        writer.writeheader()
        writer.writerows(history)
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Raises ValueError, in one sentence, where there is none or a field is wrong."""
    try:
        return Recipe(**yaml.safe_load(path.read_text()))
    except OSError as error:
        raise ValueError(f"{path} is missing: a host is trained from a folder with a recipe.yaml.") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
    except (TypeError, UnicodeDecodeError, yaml.YAMLError):
        raise ValueError(f"{path} is not a YAML mapping of fields to values.") from None


def train(folder: Path, build: Path) -> float:
    """Train (or go on training) the host whose recipe is in `folder`; returns its held-out loss in nats a token.

    Raises ValueError as `read_recipe` does, FloatingPointError where the loss is not finite.
    """
    recipe = read_recipe(folder / "recipe.yaml")
    build.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    tokenizer_file = build / "tokenizer.json"
    if not tokenizer_file.exists():
        trained = docstrings.train_tokenizer(docstrings.texts("host"), recipe.vocabulary)
        write_atomically(tokenizer_file, lambda path: trained.save(str(path)))
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    training_tokens = stream(tokenizer, "host", build / "host.npy")
    heldout_tokens = stream(tokenizer, "heldout", build / "heldout.npy")

    model = load.adapter(recipe.family).build(recipe.architecture | {"vocab_size": recipe.vocabulary}).train()
    made = optimizers(model, recipe)
    checkpoint, start, history, seconds = build / "checkpoint.pt", 0, [], 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(made, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        start, history, seconds = saved["step"], saved["history"], saved["seconds"]
    loss_of = loss_function(model, recipe)
    load.adapter(recipe.family).before_training(model)
    compiled = torch.compile(loss_of) if recipe.compile else loss_of

    began, running = time.monotonic() - seconds, math.nan
    bar = tqdm(range(start, recipe.steps), initial=start, total=recipe.steps, desc=folder.name, mininterval=10)
    for step in bar:
        loss = accumulate(compiled, batch_at(training_tokens, recipe, step), recipe.at_once)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * recipe.learning_rate(step)
            optimizer.step()
            optimizer.zero_grad()
        running = loss if math.isnan(running) else 0.95 * running + 0.05 * loss
        if not math.isfinite(running):
            raise FloatingPointError(
                f"The loss of {folder.name} is not finite at step {step}: lower matrix_lr in its recipe."
            )
        bar.set_postfix(loss=f"{running:.3f}", refresh=False)
        done = step + 1
        if done % recipe.evaluate_every == 0 or done == recipe.steps:
            heldout = heldout_loss(loss_of, heldout_tokens, recipe.context)
            history.append(
                dict(
                    step=done,
                    tokens=done * recipe.batch * recipe.context,
                    seconds=round(time.monotonic() - began),
                    training_loss=round(running, 4),
                    heldout_loss=round(heldout, 4),
                )
            )
            tqdm.write(json.dumps(history[-1]))
            state = dict(
                model=model.state_dict(),
                optimizers=[o.state_dict() for o in made],
                step=done,
                history=history,
                seconds=time.monotonic() - began,
            )
            write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))
    record = dict(
        parameters=sum(p.numel() for p in model.parameters()),
        tokens=recipe.steps * recipe.batch * recipe.context,
        corpus_tokens=len(training_tokens),
        heldout_loss=history[-1]["heldout_loss"],
        seconds=round(time.monotonic() - began),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )
    export(model, tokenizer, recipe, record, history, folder)
    return record["heldout_loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="models/NAME with a recipe.yaml")
    for folder in parser.parse_args().folders:
        build = Path(os.environ.get("WRITESAE_BUILD", "build")) / "hosts" / folder.name
        try:
            print(f"{folder}: held-out loss {train(folder, build):.3f} nats a token")
        except (ValueError, FloatingPointError) as error:
            sys.exit(f"{folder} was not trained: {error}")
