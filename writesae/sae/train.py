"""Training sparse autoencoders of a cell's history by the paper's recipe (its App. D), without forming states.

For a bilinear or tied encoder and a rank-1 decoder the squared error of a token needs no d_k x d_v matrix. With
x = (X - mean) / scale, atoms v_i w_i^T, coefficients c and G_ij = (v_i . v_j)(w_i . w_j),

    ||x - sum_i c_i v_i w_i^T||^2 = ||x||^2 - 2 sum_i c_i <v_i w_i^T, x> + c^T G c.

Its mean over tokens is the fraction of variance unexplained (FVU), because the mean of ||x||^2 is 1. The dead-atom loss
follows Gao et al. 2024 (Scaling and evaluating sparse autoencoders, App. A.2): what is left, e = x - xhat, is
reconstructed by atoms that have long been silent. Every other pair of parts takes the dense path: the
same losses, on states. What a sparsity rule adds to the loss is in writesae.sae.sparsity.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from writesae.files import write_atomically
from writesae.history import History
from writesae.sae.losses import _loss, tf32
from writesae.sae.model import SAE, SAEConfig
from writesae.sae.parts import check_parts

CHECKPOINT_SECONDS = 60.0
RESAMPLE_UNTIL = 0.8  # of all steps
RESAMPLE_BATCHES = 4  # batches from whose worst tokens silent atoms are restarted
POWER_ITERATIONS = 20
INIT_NOISE = 0.2  # norm of the noise on the unit factors of the tokens that atoms start from
CURVE_POINTS = 200
START_WINDOWS = 4  # in which sparsity rules with thresholds count active atoms before training


class TrainingSettings(BaseModel):
    """What a training run depends on, beside its data. The defaults are the paper's (Sec. 3, App. D, Table 10)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    n_atoms: PositiveInt
    k: PositiveInt
    encoder: Literal["bilinear", "dense", "tied"] = "bilinear"
    decoder: Literal["rank1", "flat"] = "rank1"
    activation: Literal["topk", "batch_topk", "jumprelu", "gated"] = "topk"
    rank: PositiveInt = Field(1, description="outer products in an atom and in a filter, for bilinear + rank1")
    tokens: PositiveInt = Field(description="training tokens seen in all, rounded up to whole batches")
    batch_windows: PositiveInt = 4
    lr: PositiveFloat = Field(3e-4, description="peak learning rate of Adam")
    final_lr: NonNegativeFloat = Field(3e-5, description="where the cosine ends")
    warmup: int = Field(50, ge=0, description="steps of linear warm-up")
    aux_weight: NonNegativeFloat = Field(1e-2, description="weight of the dead-atom loss")
    k_aux: PositiveInt = Field(256, description="silent atoms that reconstruct the residual of a token")
    dead_after: PositiveInt = Field(100, description="steps without firing after which an atom counts as silent")
    resample_every: PositiveInt = 250
    renormalise_every: PositiveInt = 100
    products: Literal["fp32", "tf32", "bf16"] = Field(
        "fp32",
        description="how a step's matrix products are taken; bf16: the factored loss's with tokens, of rounded factors and "
        "with sums in fp32, and the others in tf32 (which is fp32 without CUDA)",
    )
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> TrainingSettings:
        if self.k > self.n_atoms:
            raise ValueError(f"k = {self.k} exceeds n_atoms = {self.n_atoms}")
        if self.final_lr > self.lr:
            raise ValueError(f"final_lr = {self.final_lr} exceeds lr = {self.lr}")
        check_parts(**self.kind)
        return self

    @property
    def kind(self) -> dict[str, str | int]:
        """Which SAE: encoder, decoder, activation and rank, as SAE and SAEConfig take them."""
        return dict(encoder=self.encoder, decoder=self.decoder, activation=self.activation, rank=self.rank)

    @property
    def variant(self) -> str:
        """Its name in tables: encoder+decoder, and +activation where it is not topk."""
        decoder = self.decoder if self.rank == 1 else f"rank{self.rank}"
        return "+".join([self.encoder, decoder] + [self.activation] * (self.activation != "topk"))

    def steps(self, window_tokens: int) -> int:
        """Steps of batch_windows windows of `window_tokens` tokens."""
        return -(-self.tokens // (self.batch_windows * window_tokens))


@dataclass
class TrainingRecord:
    """How a run went. A curve is a list of (last step, mean over the steps since the point before)."""

    seconds: float
    tokens: int
    steps: int
    loss: list[tuple[int, float]]
    fvu: list[tuple[int, float]]
    validation_fvu: float | None = None  # None: no validation data were given
    alive: int | None = None  # atoms that fire (are in some top k with a positive coefficient) on the validation data
    dead: int | None = None


def learning_rate(settings: TrainingSettings, step: int, steps: int) -> float:
    """Linear warm-up, then a cosine from lr to final_lr; `step` counts from 0."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, steps - 1 - settings.warmup)
    return settings.final_lr + (settings.lr - settings.final_lr) * (1 + math.cos(math.pi * done)) / 2


def batch_of(settings: TrainingSettings, windows: int, step: int) -> Tensor:
    """The windows of a step, [batch_windows]: a seeded shuffle an epoch; a function of (seed, step) alone."""
    per_epoch = windows // settings.batch_windows
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(windows, generator=_generator(settings.seed, "epoch", epoch))
    return order[place * settings.batch_windows : (place + 1) * settings.batch_windows]


def _generator(seed: int, purpose: str, number: int = 0) -> torch.Generator:
    digest = hashlib.sha256(f"{seed} {purpose} {number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def train(
    history: History,
    settings: TrainingSettings,
    *,
    progress: bool = True,
    checkpoint: Path | str | None = None,
    validation: History | None = None,
) -> tuple[SAE, TrainingRecord]:
    """Train an SAE on every X_t of `history`; the same seed and thread count give the same result, bit for bit. A
    writesae.shards.ShardedHistory, which stays on disk, does as well.

    `checkpoint` is a file that is written now and then and at the end: a run that was killed goes on from there when it
    is started again, to the result it would have had. Remove it once the SAE is saved.
    Raises ValueError on fewer windows than a batch, data that never vary, validation data of another kind, and a checkpoint
    of another run; FloatingPointError when the loss is not finite.
    """
    if len(history) < settings.batch_windows:
        raise ValueError(f"A batch takes {settings.batch_windows} windows, the history has {len(history)}.")
    if checkpoint and Path(checkpoint).is_dir():
        raise ValueError(f"The checkpoint {checkpoint} is a folder: give the path of a file.")
    run = _Run.start(history, settings)
    if validation is not None:  # before the training, not after it
        run.sae.check_history(validation)
        if validation.target != history.target:
            raise ValueError(
                f"The SAE is to be of {history.target}s, and the validation data are {validation.target}s."
            )
    identity = f"{settings.model_dump_json()} {history.fingerprint()}" if checkpoint else ""
    if checkpoint and Path(checkpoint).exists():
        run.restore(Path(checkpoint), identity)
    began, saved = time.monotonic() - run.seconds, time.monotonic()
    bar = tqdm(total=run.steps, initial=run.step, disable=not progress, desc="SAE", unit="step", mininterval=1.0)
    while run.step < run.steps:
        run.advance()
        bar.update()
        last = run.step == run.steps
        if checkpoint and (last or time.monotonic() - saved >= CHECKPOINT_SECONDS):
            run.seconds = time.monotonic() - began
            run.save(Path(checkpoint), identity)
            saved = time.monotonic()
    bar.close()
    run.seconds = time.monotonic() - began
    run.sae.requires_grad_(False)
    if history.origin:
        shape = dict(n_atoms=settings.n_atoms, k=settings.k, d_k=history.d_k, d_v=history.d_v, seed=settings.seed)
        kind = settings.kind | history.origin._asdict()
        run.sae.config = SAEConfig(target=history.target, **shape, **kind)
    record = run.record()
    if validation is not None:
        record.validation_fvu, record.alive = evaluate(run.sae, validation)
        record.dead = settings.n_atoms - record.alive
    return run.sae, record


class Tokens(NamedTuple):
    """An SAE on every token of some windows, in raw units."""

    squared: Tensor  # [N, T] fp64, ||X - Xhat||^2
    energy: Tensor  # [N, T], ||X - mean||^2, with the SAE's own mean
    indices: Tensor  # [N, T, slots]
    coefficients: Tensor  # [N, T, slots], in no order


@torch.no_grad()
def by_group(sae: SAE, history: History) -> Iterator[Tokens]:
    """The errors and the active atoms of a history, some windows at a time, in order. ValueError as `SAE.check_history`."""
    sae.check_history(history)
    for group in history.groups(sae.group_size(history)):
        energy = group.energy(sae.mean)
        loss = _loss(sae, group, energy)
        squared = loss.squared.double() * sae.scale.item() ** 2
        yield Tokens(squared, energy, loss.indices, loss.coefficients * sae.scale)


def evaluate(sae: SAE, history: History) -> tuple[float, int]:
    """(FVU, atoms that fire) on every token of a history; the variance is taken about the SAE's own mean."""
    error, variance, fired = 0.0, 0.0, torch.zeros(sae.n_atoms, dtype=torch.bool)
    for tokens in by_group(sae, history):
        error += tokens.squared.sum().item()
        variance += tokens.energy.double().sum().item()
        fired[tokens.indices[tokens.coefficients > 0].cpu()] = True
    return error / variance, int(fired.sum())


@dataclass
class _Run:
    """A training run between two steps."""

    settings: TrainingSettings
    history: History
    energy: Tensor  # [N, T], ||X_t - mean||^2
    sae: SAE
    optimiser: torch.optim.Adam
    steps: int
    silent: Tensor  # [n] steps since each atom last fired
    losses: Tensor  # [steps, 2]: loss, FVU
    step: int = 0
    seconds: float = field(default=0.0)

    @classmethod
    def start(cls, history: History, settings: TrainingSettings) -> _Run:
        sae = SAE(settings.n_atoms, settings.k, history.d_k, history.d_v, **settings.kind).to(history.key)
        sae.mean.copy_(history.mean())
        energy = history.energy(sae.mean)
        sae.scale.copy_(energy.double().mean().sqrt())
        if not sae.scale > 0:
            raise ValueError("The matrices of this history are all the same: there is nothing to train on.")
        initialise(sae, history, settings.seed)
        optimiser = torch.optim.Adam(sae.parameters(), lr=settings.lr, fused=True)
        steps = settings.steps(history.shape[1])
        silent = torch.zeros(settings.n_atoms, dtype=torch.int64, device=history.key.device)
        return cls(settings, history, energy, sae, optimiser, steps, silent, torch.zeros(steps, 2))

    def advance(self) -> None:
        """One step: gradient, Adam, and on their days normalisation and resampling."""
        settings = self.settings
        windows = batch_of(settings, len(self.history), self.step)
        dead = (self.silent >= settings.dead_after).nonzero().squeeze(-1)
        batch, energy = self.history[windows], self.energy[windows]
        weights = dict(aux_weight=settings.aux_weight, k_aux=settings.k_aux)
        with tf32(settings.products != "fp32"):
            loss = _loss(self.sae, batch, energy, dead, settings.products == "bf16", **weights)
            if not torch.isfinite(loss.total):
                raise FloatingPointError(
                    f"The loss is {loss.total.item()} at step {self.step}: lower lr = {settings.lr}."
                )
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
        """Restart atoms [D] as top singular pairs of residuals, drawn with probability proportional to their energy."""
        if not len(dead):
            return
        generator = _generator(self.settings.seed, "resample", self.step)
        count = min(len(self.history), RESAMPLE_BATCHES * self.settings.batch_windows)
        windows = torch.randperm(len(self.history), generator=generator)[:count]
        residuals = _worst_residuals(self.sae, self.history[windows], self.energy[windows], len(dead), generator)
        dead = dead[: len(residuals)]
        key, value = (
            top_singular_pair(residuals) if self.sae.rank == 1 else top_singular_pairs(residuals, self.sae.rank)
        )
        for part in (self.sae.encoder, self.sae.decoder):
            part.assign(dead, key, value)
        self.sae.encoder.clear_bias(dead)
        self.sae.activation.restart(dead, self.sae.encoder.bias)
        for state in self.optimiser.state.values():
            state["exp_avg"][dead] = 0
            state["exp_avg_sq"][dead] = 0
        self.silent[dead] = 0

    def record(self) -> TrainingRecord:
        loss, fvu = (_curve(column) for column in self.losses.unbind(1))
        windows = self.steps * self.settings.batch_windows
        return TrainingRecord(self.seconds, windows * self.history.shape[1], self.steps, loss, fvu)

    def _named_moments(self) -> Iterator[tuple[str, torch.nn.Parameter, str]]:
        for name, parameter in self.sae.named_parameters():
            for moment in ("exp_avg", "exp_avg_sq", "step"):
                yield f"adam.{name}.{moment}", parameter, moment

    def save(self, path: Path, identity: str) -> None:
        """Everything the next step depends on, as safetensors; `identity` names settings and data."""
        tensors = {f"sae.{name}": x for name, x in self.sae.state_dict().items()}
        tensors |= {name: self.optimiser.state[p][moment] for name, p, moment in self._named_moments()}
        tensors |= {"silent": self.silent, "losses": self.losses}
        metadata = {"identity": identity, "step": str(self.step), "seconds": str(self.seconds)}
        tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
        write_atomically(path, lambda partial: save_file(tensors, partial, metadata))

    def restore(self, path: Path, identity: str) -> None:
        """Go on from what `save` wrote; ValueError when it belongs to other settings or data."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to start again.") from error
        if metadata.get("identity") != identity:
            raise ValueError(f"{path} is the checkpoint of a run with other settings or other data; remove it.")
        prefix = "sae."
        self.sae.load_state_dict({n[len(prefix) :]: x for n, x in tensors.items() if n.startswith(prefix)})
        for name, parameter, moment in self._named_moments():
            self.optimiser.state[parameter][moment] = tensors[name].to(parameter.device)
        self.silent.copy_(tensors["silent"])
        self.losses.copy_(tensors["losses"])
        self.step, self.seconds = int(metadata["step"]), float(metadata["seconds"])


@torch.no_grad()
def initialise(sae: SAE, history: History, seed: int) -> None:
    """Start atom i at the unit factors of a random token's write plus noise; the encoder starts as the decoder.

    Atoms then point where the data lie, so few are dead from the start; the noise keeps repeated tokens apart. An atom
    of rank r starts as the sum of r tokens' writes. Sparsity rules with thresholds set them on a few windows.
    """
    generator = _generator(seed, "initialise")
    windows, tokens = history.shape
    window = torch.randint(windows, (sae.n_atoms * sae.rank,), generator=generator)
    position = torch.randint(tokens, (sae.n_atoms * sae.rank,), generator=generator)
    factors = []
    for x in history.factors_at(window, position):
        chosen = F.normalize(x, dim=-1)
        noise = torch.randn(chosen.shape, generator=generator).to(chosen) * INIT_NOISE / chosen.shape[-1] ** 0.5
        factors.append(F.normalize(chosen + noise, dim=-1))
    if sae.rank > 1:
        factors = [x.unflatten(0, (sae.n_atoms, sae.rank)) for x in factors]
    rows = torch.arange(sae.n_atoms, device=history.key.device)
    for part in (sae.encoder, sae.decoder):
        part.assign(rows, *factors)
    sae.encoder.clear_bias(rows)
    if sae.rank > 1:
        sae.normalise()
    if sae.activation.every:
        few = history[torch.randperm(windows, generator=generator)[:START_WINDOWS]]
        sae.activation.start(sae.encoder.dense(sae.standardise(few.steps())), sae.encoder.bias)


def _worst_residuals(sae: SAE, history: History, energy: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """x - xhat of at most `count` different tokens, drawn in proportion to ||x - xhat||^2: [count, d_k, d_v]."""
    size, start, losses = sae.group_size(history), 0, []
    for group in history.groups(size):
        losses.append(_loss(sae, group, energy[start : start + size]))
        start += size
    odds = torch.cat([loss.squared for loss in losses]).flatten().double().clamp_min(0).cpu()
    count = min(count, int((odds > 0).sum()))
    tokens = torch.multinomial(odds, count, generator=generator).to(history.key.device)
    indices, coefficients = (torch.cat(x).flatten(0, 1)[tokens] for x in zip(*(loss[3:] for loss in losses)))
    x = sae.standardise(history.matrices(tokens // history.shape[1], tokens % history.shape[1]))
    return x - sae.decoder.dense(indices, coefficients)


def top_singular_pair(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Unit left [r, d_k] and right [r, d_v] singular vectors of the largest singular value, by power iteration.

    It starts from each matrix's longest row; after POWER_ITERATIONS a nearly equal second pair may still be mixed in.
    """
    longest = matrices.norm(dim=2).argmax(1)
    right = F.normalize(matrices[torch.arange(len(matrices), device=matrices.device), longest], dim=-1)
    for _ in range(POWER_ITERATIONS):
        left = F.normalize((matrices @ right[..., None]).squeeze(-1), dim=-1)
        right = F.normalize((left[:, None] @ matrices).squeeze(1), dim=-1)
    return left, right


def top_singular_pairs(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`rank` leading singular pairs of [m, d_k, d_v], each times the root of its share of their energy: key
    [m, rank, d_k], value [m, rank, d_v] with sum_r key_r value_r^T of unit Frobenius norm."""
    left, size, right = torch.linalg.svd(matrices, full_matrices=False)
    weight = F.normalize(size[:, :rank], dim=-1).sqrt()[..., None]
    return left[:, :, :rank].transpose(1, 2) * weight, right[:, :rank] * weight


def _curve(values: Tensor) -> list[tuple[int, float]]:
    size = max(1, -(-len(values) // CURVE_POINTS))
    return [(min((i + 1) * size, len(values)), part.mean().item()) for i, part in enumerate(values.split(size))]
