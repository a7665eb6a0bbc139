"""Compare the factored training step with steps on stored states: `python benchmarks/training_step.py`.

Each case does one whole training step on the same tokens: pre-activations, top-k, reconstruction, dead-atom
loss, gradient, Adam.

- factored: one step of writesae.sae.train;
- plain: the paper's recipe (Sec. 2, App. D, Table 10), literally: the bilinear encoder is an einsum over
  states, the decoder multiplies all atoms, and a batch has 256 states;
- whole: the same with all states in one batch (middle side only);
- shared: the part of a factored step that SAEs on the same batches could share: the batch, its chunks and
  decays, and its energies. Its ratio to the step is what several seeds could save;
- dense: `dense_loss`, this project's code for states. It is faster than the recipe: the encoder is one matrix
  product, and the decoder reads active atoms only.

The states are in memory; the paper's pipeline also reads them from disk. "plain" and "dense" sum the
gradients of batches of 256 states, which takes less time and memory than all states at once. The learning
rate is so small that no parameter changes, so every call of every case must give the same loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from common import Case, Comparison, device, main, must_agree
from torch import Tensor

from writesae.history import History
from writesae.sae.losses import dense_loss
from writesae.sae.train import TrainingSettings, _Run, batch_of

SIZES = dict(sides=(64, 128, 256), n_atoms=2048, k=32, windows=4, tokens=256, silent=300)
QUICK = dict(sides=(8, 16, 32), n_atoms=64, k=4, windows=2, tokens=64, silent=12)
AUX_WEIGHT, K_AUX, PART = 1e-2, 256, 256
TOLERANCE = 1e-4


def plain_loss(x: Tensor, parameters: list[Tensor], k: int, dead: Tensor) -> Tensor:
    """Return the paper's loss on centred and scaled states x [B, d_k, d_v].

    parameters: encoder key, value, bias; decoder key, value. dead: the indices of the dead atoms."""
    enc_key, enc_value, bias, dec_key, dec_value = parameters
    pre = torch.einsum("nk,bkv,nv->bn", enc_key, x, enc_value) + bias
    error = x - torch.einsum("bn,nk,nv->bkv", top(pre, k), dec_key, dec_value)
    again = torch.einsum("bn,nk,nv->bkv", top(pre[:, dead], min(K_AUX, len(dead))), dec_key[dead], dec_value[dead])
    dead_loss = (error.detach() - again).square().sum((1, 2)).mean()
    return error.square().sum((1, 2)).mean() + AUX_WEIGHT * dead_loss


def top(pre: Tensor, k: int) -> Tensor:
    """Return `pre` [B, n] with the k largest values of each row after a ReLU, and zeros elsewhere."""
    values, indices = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, indices, values.relu())


def new_run(side: int, n_atoms: int, k: int, windows: int, tokens: int, silent: int) -> _Run:
    """Return a training run on a random history. No atom is dead yet: `silent` is for the caller's step."""
    generator = torch.Generator().manual_seed(0)
    key, value = (torch.randn(windows, tokens, side, generator=generator) for _ in range(2))
    log_decay = -0.1 * torch.rand(windows, tokens, generator=generator)
    history = History(*(x.to(device()) for x in (F.normalize(key, dim=-1), value, log_decay)))
    settings = TrainingSettings(
        n_atoms=n_atoms, k=k, tokens=100 * windows * tokens, batch_windows=windows, lr=1e-12, final_lr=0.0
    )
    return _Run(history, settings)


def first_step(run: _Run, silent: int) -> Tensor:
    """Do the first step of the trainer, with the first `silent` atoms dead, and return its loss [1]."""
    run.step = 0
    run.silent.zero_()
    run.silent[:silent] = run.settings.dead_after
    run.advance()
    return run.losses[0, :1]


def factored(silent: int, **sizes: int) -> Callable[[], float]:
    """Return one step of the trainer as a function that returns the loss."""
    run = new_run(silent=silent, **sizes)
    return lambda: first_step(run, silent).item()


def shared(silent: int, **sizes: int) -> Callable[[], None]:
    """Return what does not depend on the SAE in one step of the trainer, as a function."""
    run = new_run(silent=silent, **sizes)

    def batch() -> None:
        windows = batch_of(run.settings, len(run.history), 0)
        _ = run.history[windows].chunks, run.energy[windows]

    return batch


def on_states(kind: str, k: int, silent: int, **sizes: int) -> Callable[[], float]:
    """Return one step of kind "plain", "whole" or "dense", from the same parameters, as a function."""
    run = new_run(k=k, silent=silent, **sizes)
    sae, dead = run.sae, torch.arange(silent, device=device())
    states = run.history.steps().flatten(0, 1)
    size = len(states) if kind == "whole" else PART
    if kind != "dense":
        states.sub_(sae.mean).div_(sae.scale)
    parameters = [sae.encoder.key, sae.encoder.value, sae.encoder.bias, sae.decoder.key, sae.decoder.value]
    optimiser = torch.optim.Adam(parameters, lr=1e-12)

    def loss_of(part: Tensor) -> Tensor:
        if kind != "dense":
            return plain_loss(part, parameters, k, dead)
        return dense_loss(sae, part[None], dead, AUX_WEIGHT, K_AUX).total

    def step() -> float:
        optimiser.zero_grad(set_to_none=True)
        total = 0.0
        for part in states.split(size):
            loss = loss_of(part) * (len(part) / len(states))
            loss.backward()
            total += loss.item()
        optimiser.step()
        return total

    return step


def same_losses(results: dict[str, float]) -> dict[str, float]:
    """Return the largest relative difference between a loss on states and the factored loss of the same side.

    Raises ValueError if it exceeds TOLERANCE."""
    largest = 0.0
    for name, loss in results.items():
        kind, _, side = name.partition(" ")
        if kind in ("plain", "whole", "dense"):
            wanted = results[f"factored {side}"]
            largest = max(largest, abs(loss - wanted) / abs(wanted))
    must_agree(largest, TOLERANCE, "The losses differ: the cases do not do the same work")
    return dict(difference=largest)


def comparisons(quick: bool) -> list[Comparison]:
    sizes = QUICK if quick else SIZES
    sides, rest = sizes["sides"], {name: size for name, size in sizes.items() if name != "sides"}
    amount, cases = rest["windows"] * rest["tokens"], []
    for side in sides:
        labels = dict(side=side)
        make = partial(factored, side=side, **rest)
        cases.append(Case(f"factored {side}", make, amount, f"factored {sides[0]}", labels | dict(method="factored")))
        make = partial(shared, side=side, **rest)
        cases.append(Case(f"shared {side}", make, amount, f"factored {side}", labels | dict(method="shared")))
        for kind in ("plain", "whole", "dense") if side == sides[1] else ("plain", "dense"):
            make = partial(on_states, kind, side=side, **rest)
            cases.append(Case(f"{kind} {side}", make, amount, f"factored {side}", labels | dict(method=kind)))
    return [Comparison(dict(unit="token", **rest), cases, same_losses, rounds=3, count_products=True)]


if __name__ == "__main__":
    main("training_step", comparisons)
