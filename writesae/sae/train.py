"""Training sparse autoencoders of a cell's history by the paper's recipe (App. D).

Each step of Adam takes the loss (writesae.sae.losses) of all tokens of some windows. Silent atoms get a
dead-atom loss, and at regular steps they restart from badly reconstructed tokens.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from writesae.files import local_path, reading, write_atomically
from writesae.history import History
from writesae.recurrence import Factors, torch_defaults
from writesae.sae.config import Architecture, SAEConfig
from writesae.sae.losses import loss_of, tf32
from writesae.sae.model import SAE

CHECKPOINT_SECONDS = 60.0
RESAMPLE_UNTIL = 0.8  # fraction of all steps
RESAMPLE_BATCHES = 4  # batches from which silent atoms restart
POWER_ITERATIONS = 20
INIT_NOISE = 0.2  # norm of the noise on initial atoms
CURVE_POINTS = 200
START_WINDOWS = 4  # windows from which initial thresholds are set


class TrainingSettings(Architecture):
    """An architecture and its training. Defaults: the paper's (App. D), except its batches of 256 tokens."""

    tokens: PositiveInt = Field(description="training tokens seen in total, rounded up to whole batches")
    batch_windows: PositiveInt = 4
    lr: PositiveFloat = Field(3e-4, description="peak learning rate of Adam")
    final_lr: NonNegativeFloat = Field(3e-5, description="learning rate at the end of the cosine")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    aux_weight: NonNegativeFloat = Field(1e-2, description="weight of the dead-atom loss")
    k_aux: PositiveInt = Field(256, description="silent atoms that reconstruct the residual of a token")
    dead_after: PositiveInt = Field(100, description="steps without firing until an atom counts as silent")
    resample_every: PositiveInt = 250
    renormalise_every: PositiveInt = 100
    products: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32", description="of matrix products; bf16: those with tokens in the factored loss, the others in tf32"
    )
    initial: Literal["data", "random"] = Field("data", description="factors of atoms: of writes, or Gaussian")
    seed: int = 0

    @property
    def variant(self) -> str:
        """The name in tables, with +random for random initial atoms."""
        return super().variant + "+random" * (self.initial == "random")

    @model_validator(mode="after")
    def _rates_fit(self) -> TrainingSettings:
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr = {self.final_lr} exceeds lr = {self.lr}")
        return self

    def steps(self, window_tokens: int) -> int:
        """Return the number of steps for windows of `window_tokens` tokens."""
        return -(-self.tokens // (self.batch_windows * window_tokens))


def sae_bytes(d_k: int, d_v: int, settings: TrainingSettings) -> int:
    """Return the size of an SAE's weights in fp32."""
    whole, factors = d_k * d_v, settings.rank * (d_k + d_v)
    encoder = whole if settings.encoder == "dense" else 0 if settings.encoder == "tied" else factors
    decoder = whole if settings.decoder == "flat" else factors
    return 4 * (settings.n_atoms * (encoder + decoder + 1) + whole)


@dataclass
class TrainingRecord:
    """The course of a run. A curve is a list of (last step, mean since the previous point)."""

    seconds: float
    tokens: int
    steps: int
    loss: list[tuple[int, float]]
    fvu: list[tuple[int, float]]
    validation_fvu: float | None = None  # None without validation data
    alive: int | None = None  # atoms with a positive coefficient somewhere in the validation data
    dead: int | None = None


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine from lr to final_lr."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - 1 - settings.warmup)
    return settings.final_lr + (settings.lr - settings.final_lr) * (1 + math.cos(math.pi * done)) / 2


def batch_of(settings: TrainingSettings, windows: int, step: int) -> Tensor:
    """Return the windows of a step, [batch_windows], from one seeded shuffle per epoch."""
    per_epoch = windows // settings.batch_windows
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(windows, generator=_generator(settings.seed, "epoch", epoch))
    return order[place * settings.batch_windows : (place + 1) * settings.batch_windows]


def _generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@torch_defaults(gradients=True)
def train(
    history: History,
    settings: TrainingSettings,
    *,
    progress: bool = True,
    checkpoint: Path | str | None = None,
    validation: History | None = None,
) -> tuple[SAE, TrainingRecord]:
    """Train an SAE on every X_t of `history`, in memory or on disk. The same seed gives the same bits.

    checkpoint: a file, saved every minute and at the end, from which a killed run continues identically.
    validation: for the record's validation_fvu, alive, dead. Raises ValueError for less data than a batch,
    constant data, other validation data, another run's checkpoint; FloatingPointError for a NaN loss."""
    if isinstance(history, Factors):
        raise ValueError('SAEs are trained on a history: cell.history("write"), or cell.history("state").')
    if len(history) < settings.batch_windows:
        raise ValueError(f"A batch takes {settings.batch_windows} windows, the history has {len(history)}.")
    checkpoint = local_path(checkpoint) if checkpoint else None
    if checkpoint and checkpoint.is_dir():
        raise ValueError(f"The checkpoint {checkpoint} is a folder: give the path of a file.")
    run = _Run(history, settings)
    if validation is not None:
        run.sae.check_history(validation)
        if validation.target != history.target:
            raise ValueError(f"The training data are {history.target}s, the validation data {validation.target}s.")
    identity = f"{settings.model_dump_json()} {history.fingerprint()}" if checkpoint else ""
    if checkpoint and checkpoint.exists():
        run.restore(checkpoint, identity)
    began, saved = time.monotonic() - run.seconds, time.monotonic()
    for step in tqdm(range(run.step, run.steps), disable=not progress, desc="SAE", unit="step", mininterval=1.0):
        run.advance()
        run.seconds = time.monotonic() - began
        if checkpoint and (step + 1 == run.steps or time.monotonic() - saved >= CHECKPOINT_SECONDS):
            run.save(checkpoint, identity)
            saved = time.monotonic()
    run.sae.requires_grad_(False).eval()
    tokens = run.steps * settings.batch_windows * history.shape[1]
    record = TrainingRecord(run.seconds, tokens, run.steps, *map(_curve, run.losses.unbind(1)))
    if validation is not None:
        record.validation_fvu, record.alive = evaluate(run.sae, validation)
        record.dead = settings.n_atoms - record.alive
    return run.sae, record


class Tokens(NamedTuple):
    """The errors and active atoms of an SAE on some windows, in raw units."""

    squared: Tensor  # [N, T] fp64, ||X - Xhat||^2
    energy: Tensor  # [N, T], ||X - M||^2; M: the SAE's mean, or without one that of the history
    indices: Tensor  # [N, T, slots]
    coefficients: Tensor  # [N, T, slots], in no order


@torch.no_grad()
def by_group(sae: SAE, history: History) -> Iterator[Tokens]:
    """Yield `Tokens` of a few windows at a time. Raises as `SAE.check_history`."""
    sae.check_history(history)
    mean = sae.mean if sae.config.centre == "mean" else history.mean()
    for group in history.groups(sae.group_size(history)):
        energy = group.energy(mean)
        loss = loss_of(sae, group, energy if mean is sae.mean else group.energy(sae.mean))
        squared = loss.squared.double() * sae.scale.item() ** 2
        yield Tokens(squared, energy, loss.indices, loss.coefficients * sae.scale)


def evaluate(sae: SAE, history: History) -> tuple[float, int]:
    """Return the FVU about the mean (of `Tokens.energy`) and the number of atoms that fire."""
    error, variance, fired = 0.0, 0.0, torch.zeros(sae.n_atoms, dtype=torch.bool)
    for tokens in by_group(sae, history):
        error += tokens.squared.sum().item()
        variance += tokens.energy.double().sum().item()
        fired[tokens.indices[tokens.coefficients > 0].cpu()] = True
    return error / variance, int(fired.sum())


class _Run:
    """The state of a training run between two steps."""

    def __init__(self, history: History, settings: TrainingSettings) -> None:
        self.settings, self.history, self.steps = settings, history, settings.steps(history.shape[1])
        fields = settings.model_dump(include=set(SAEConfig.model_fields)) | dict(target=history.target)
        fields |= history.origin._asdict() if history.origin else {}
        config = SAEConfig(**fields, d_k=history.d_k, d_v=history.d_v)
        self.sae = SAE(config, history.d_k, history.d_v).to(history.key).train()
        if settings.centre == "mean":
            self.sae.mean.copy_(history.mean())
        self.energy = history.energy(self.sae.mean)  # [N, T], ||X_t - mean||^2
        self.sae.scale.copy_(self.energy.double().mean().sqrt())
        if not self.sae.scale > 0:
            raise ValueError("The matrices of this history are all the same: there is nothing to train on.")
        initialise(self.sae, history, settings.seed, settings.initial)
        self.optimiser = torch.optim.Adam(self.sae.parameters(), lr=settings.lr, fused=True)
        self.silent = torch.zeros(settings.n_atoms, dtype=torch.int64, device=history.key.device)
        self.losses = torch.zeros(self.steps, 2)  # loss, FVU; `silent`: steps since each atom fired
        self.step, self.seconds = 0, 0.0

    def advance(self) -> None:
        """Take one step: gradient, Adam, and at regular steps normalisation and resampling."""
        settings = self.settings
        windows = batch_of(settings, len(self.history), self.step)
        dead = (self.silent >= settings.dead_after).nonzero().squeeze(-1)
        batch, energy = self.history[windows], self.energy[windows]
        weights = dict(aux_weight=settings.aux_weight, k_aux=settings.k_aux)
        with tf32(settings.products != "fp32"):
            loss = loss_of(self.sae, batch, energy, dead, settings.products == "bf16", **weights)
            if not torch.isfinite(loss.total):
                value = loss.total.item()
                raise FloatingPointError(f"The loss is {value} at step {self.step}: lower lr = {settings.lr}.")
            self.optimiser.zero_grad(set_to_none=True)
            loss.total.backward()
        self.optimiser.param_groups[0]["lr"] = learning_rate(settings, self.step, self.steps)
        self.optimiser.step()
        self.losses[self.step, 0], self.losses[self.step, 1] = loss.total.detach(), loss.fvu
        self.silent += 1
        self.silent[loss.indices[loss.coefficients > 0]] = 0
        self.step += 1
        if self.step % settings.renormalise_every == 0 or self.step == self.steps:
            self.sae.normalise()
        if self.step % settings.resample_every == 0 and self.step <= RESAMPLE_UNTIL * self.steps:
            self.resample((self.silent >= settings.dead_after).nonzero().squeeze(-1))

    @torch.no_grad()
    def resample(self, dead: Tensor) -> None:
        """Restart atoms [D] as top singular pairs of residuals, drawn in proportion to squared norm."""
        if not len(dead):
            return
        generator = _generator(self.settings.seed, "resample", self.step)
        count = min(len(self.history), RESAMPLE_BATCHES * self.settings.batch_windows)
        windows = torch.randperm(len(self.history), generator=generator)[:count]
        data = self.history[windows], self.energy[windows]
        residuals = _worst_residuals(self.sae.eval(), *data, len(dead), generator)
        self.sae.train()
        dead, rank = dead[: len(residuals)], self.sae.rank
        key, value = top_singular_pair(residuals) if rank == 1 else top_singular_pairs(residuals, rank)
        for part in (self.sae.encoder, self.sae.decoder):
            part.assign(dead, key, value)
        self.sae.encoder.bias[dead] = 0
        self.sae.activation.restart(dead, self.sae.encoder.bias)
        for parameter, state in self.optimiser.state.items():
            if parameter is not self.sae.bias:
                state["exp_avg"][dead] = state["exp_avg_sq"][dead] = 0
        self.silent[dead] = 0

    def _named_moments(self) -> Iterator[tuple[str, torch.nn.Parameter, str]]:
        for name, parameter in self.sae.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                yield f"adam.{name}.{moment}", parameter, moment

    def save(self, path: Path, identity: str) -> None:
        """Write the state of the run as safetensors; `identity`: of settings and data."""
        tensors = {f"sae.{name}": x for name, x in self.sae.state_dict().items()}
        tensors |= {name: self.optimiser.state[p][moment] for name, p, moment in self._named_moments()}
        tensors |= {"silent": self.silent, "losses": self.losses}
        metadata = {"identity": identity, "step": str(self.step), "seconds": str(self.seconds)}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        write_atomically(path, lambda partial: save_file(tensors, partial, metadata))

    def restore(self, path: Path, identity: str) -> None:
        """Continue from a file of `save`. Raises ValueError for other settings or data, and damage."""
        with reading(str(path), "remove it to start again"), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("identity") != identity:
            raise ValueError(f"{path} is the checkpoint of a run with other settings or other data; remove it.")
        self.sae.load_state_dict({n[4:]: x for n, x in tensors.items() if n.startswith("sae.")})
        for name, parameter, moment in self._named_moments():
            self.optimiser.state[parameter][moment] = tensors[name].to(parameter.device)
        self.silent.copy_(tensors["silent"])
        self.losses.copy_(tensors["losses"])
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])


@torch.no_grad()
def initialise(sae: SAE, history: History, seed: int, initial: str = "data") -> None:
    """Start each atom, and its encoder, at the unit factors of a random token's write plus noise, or at random.

    An atom of rank r is the sum of r outer products. Sparsity rules set thresholds on a few windows."""
    generator = _generator(seed, "initialise")
    (windows, tokens), count = history.shape, sae.n_atoms * sae.rank
    window = torch.randint(windows, (count,), generator=generator)
    position = torch.randint(tokens, (count,), generator=generator)
    factors = []
    for x in history.factors_at(window, position):
        noise = torch.randn(x.shape, generator=generator).to(x)
        if initial == "data":
            noise = F.normalize(x, dim=-1) + noise * INIT_NOISE / x.shape[-1] ** 0.5
        factors.append(F.normalize(noise, dim=-1))
    if sae.rank > 1:
        factors = [x.unflatten(0, (sae.n_atoms, sae.rank)) for x in factors]
    rows = torch.arange(sae.n_atoms, device=history.key.device)
    for part in (sae.encoder, sae.decoder):
        part.assign(rows, *factors)
    sae.encoder.bias.zero_()
    if sae.rank > 1:
        sae.normalise()
    if sae.activation.every:
        few = history[torch.randperm(windows, generator=generator)[:START_WINDOWS]]
        sae.activation.start(sae.encoder.dense(sae.standardise(few.steps())), sae.encoder.bias)


def _worst_residuals(sae: SAE, history: History, energy: Tensor, count: int, generator) -> Tensor:
    """Return x - xhat, [m, d_k, d_v], of m <= `count` tokens, drawn in proportion to ||x - xhat||^2."""
    losses, start = [], 0
    for group in history.groups(sae.group_size(history)):
        losses.append(loss_of(sae, group, energy[start : start + len(group)]))
        start += len(group)
    odds = torch.cat([loss.squared for loss in losses]).flatten().double().clamp_min(0).cpu()
    count = min(count, int((odds > 0).sum()))
    tokens = torch.multinomial(odds, count, generator=generator).to(history.key.device)
    indices, coefficients = (torch.cat(x).flatten(0, 1)[tokens] for x in zip(*(loss[3:] for loss in losses)))
    x = sae.standardise(history.matrices(tokens // history.shape[1], tokens % history.shape[1]))
    rest = x - sae.decoder.dense(indices, coefficients)
    return rest if sae.bias is None else rest - sae.bias


def top_singular_pair(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the unit left [r, d_k] and right [r, d_v] top singular vectors of matrices (power iteration)."""
    longest = matrices.norm(dim=2).argmax(1)
    right = F.normalize(matrices[torch.arange(len(matrices), device=matrices.device), longest], dim=-1)
    for _ in range(POWER_ITERATIONS):
        left = F.normalize((matrices @ right[..., None]).squeeze(-1), dim=-1)
        right = F.normalize((left[:, None] @ matrices).squeeze(1), dim=-1)
    return left, right


def top_singular_pairs(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return key [m, rank, d_k] and value [m, rank, d_v] of the top singular pairs; their sum has norm 1."""
    left, size, right = torch.linalg.svd(matrices, full_matrices=False)
    weight = F.normalize(size[:, :rank], dim=-1).sqrt()[..., None]
    return left[:, :, :rank].transpose(1, 2) * weight, right[:, :rank] * weight


def _curve(values: Tensor) -> list[tuple[int, float]]:
    size = max(1, -(-len(values) // CURVE_POINTS))
    return [(min((i + 1) * size, len(values)), part.mean().item()) for i, part in enumerate(values.split(size))]
