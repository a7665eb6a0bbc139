"""The effect of a write x w^T at t0 on the logit of `token` at t (the paper's Sec. 2, Eq. 1, and App. A).

- paper:      prod alpha . <x, q_t> . <W_O w, W_U[token]>, the direct path with the decay alone;
- transport:  <x_t, q_t> . <W_O w, W_U[token]>, x_t moved by the host's own transition matrices;
- exact:      x^T Gamma w, Gamma = sum_s (A_{t0+1}^T ... A_s^T q_s) r_s^T, where r_s is the gradient of the
              logit with respect to the head's output at s: every path to first order, one backward pass;
- through_layer: sum_s <G_s, layer(o_s + do_s) - layer(o_s)>, where do_s = <x_s, q_s> w, and G_s is the
              gradient of the logit with respect to the output of the edited layer at s;
- through_norm: the logit of an estimated last hidden state (`Gradients.last_hidden`), minus the native logit.

through_layer is exact in the cell and in the edited layer (norm, gate, output projection, MLP, residual), and
linear in the layers above and the final norm. through_norm is exact in the final norm and the unembedding
too: it carries the layer's change along the residual stream to the last hidden state, with the smallest
correction that makes this logit change as in through_layer. In bf16 it is rounded as the logits are. Both
take one backward pass for all writes at a place, and one run of the edited layer per write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from writesae.edit import Edit, head_change, kl, run_under
from writesae.hosts.base import Host, Run, check_places
from writesae.hosts.layers import wide
from writesae.recurrence import Factors, torch_defaults
from writesae.text import Windows

PREDICTORS = ("through_layer", "through_norm", "exact", "transport", "paper")


@torch_defaults()
def predict_shift(
    host: Host,
    windows: Windows | Tensor,
    edit: Edit,
    token: int | Sequence[int] | Tensor,
    *,
    layer: int,
    head: int,
    steps: int,
    by: str = "through_layer",
) -> Tensor:
    """Return the predicted change [R] of a logit at the last of the `steps` tokens of `run_edited`.

    token: one id, or one per row of the edit. by: a predictor as described above. Raises ValueError for
    another predictor, tokens outside the vocabulary, another number of them, and as `run_edited`.
    """
    if by not in PREDICTORS:
        raise ValueError(f"There is no predictor {by!r}: choose one of {', '.join(PREDICTORS)}.")
    run, edits = run_under(host, windows, {(layer, head): edit})
    edit, factors, tokens = edits[layer, head], host.factors(run, layer, head), torch.as_tensor(token)
    tokens = tokens.expand(len(edit.rows)) if tokens.dim() == 0 else tokens
    _check_count(tokens, edit.rows)
    change, _ = head_change(factors, edit, steps)
    if by in ("through_layer", "through_norm", "exact"):
        asked = torch.stack([edit.rows, edit.starts, tokens], 1)
        places, which = asked.unique(dim=0, return_inverse=True)  # one backward pass for all edits of a place
        rows, starts, wanted = places.unbind(1)
        slopes = logit_gradients(host, run, layer, head, rows, starts, steps, wanted[:, None])
        if by == "exact":
            return (change * slopes.head[which, 0]).sum((1, 2))
        with torch.no_grad():
            edited, _ = host.edited_layer(run, layer, head, edit.rows, edit.starts, change)
            if by == "through_layer":
                return slopes.through_layer(edited, which)[:, 0].cpu()
            shift = host.logits(slopes.last_hidden(edited, which)) - slopes.logits[which]
            return shift.gather(-1, tokens[:, None])[:, 0]
    last = change[:, -1] if by == "transport" else _read_by_decay(factors, edit, steps)
    return (last * direct_path(host, layer, head, torch.eye(host.d_v), tokens).to(last)).sum(-1)


def _read_by_decay(factors: Factors, edit: Edit, steps: int) -> Tensor:
    """Return the head's change [R, d_v] at the last step if terms only decay until then."""
    places = edit.starts[:, None] + torch.arange(steps)  # [R, steps]
    log_decay, last = factors.log_decay[edit.rows[:, None], places], places[:, -1:]
    after = places[:, None] > edit.positions[..., None]  # [R, r, steps]
    decay = torch.einsum("rjs,rsk->rjk", after.to(log_decay), log_decay).exp()
    seen = (edit.positions < last) | (edit.positions == last) & edit.reads_write[:, None]
    read = (factors.query[edit.rows, last[:, 0]][:, None] * decay * edit.left).sum(-1) * seen
    return (read[..., None] * edit.right).sum(1)


class Gradients(NamedTuple):
    """Gradients of m numbers per row, functions of the native logits at the last of some steps.

    head [R, m, steps, d_v], layer [R, m, steps, D], last [R, m, D]: with respect to the head's output, the
    output of its layer, and the last hidden state. output [R, steps, D], hidden [R, D], logits [R, V]: the
    native values. layer and output are on the layer's device, last and hidden on that of the last layer.
    """

    head: Tensor
    layer: Tensor
    last: Tensor
    output: Tensor
    hidden: Tensor
    logits: Tensor

    def through_layer(self, edited: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the linear changes [n, m] of the numbers under layer outputs `edited` [n, steps, D].

        rows [n]: the row of each output; by default there is one output per row.
        """
        return torch.einsum("nsd,nmsd->nm", wide(edited - self.output[rows]), wide(self.layer[rows]))

    def last_hidden(self, edited: Tensor, rows: Tensor | slice = slice(None), numbers=slice(None)) -> Tensor:
        """Return estimates [n, D] of the last hidden states under layer outputs `edited` [n, steps, D].

        The residual stream carries the change of the layer's last output on to the last hidden state. To this
        is added the smallest change with which the chosen `numbers` change as in `through_layer`.
        """
        slopes, places = wide(self.last[:, numbers]), self.hidden.shape[-1]
        carried = wide(edited - self.output[rows])[:, -1, :places].to(slopes.device)
        missing = self.through_layer(edited, rows)[:, numbers].to(slopes.device) - torch.einsum(
            "nmd,nd->nm", slopes[rows], carried
        )
        inverse = torch.linalg.pinv(slopes, rtol=1e-3)[rows]  # [n, D, m]
        change = carried + (inverse @ missing[..., None])[..., 0]
        return (self.hidden[rows] + change).to(self.hidden.dtype)


@torch_defaults(gradients=True)
def gradients(
    host: Host,
    run: Run,
    layer: int,
    head: int,
    rows: Tensor,
    starts: Tensor,
    steps: int,
    numbers: Callable[[Tensor], Tensor],
    upto: int | None = None,
    read: Callable[[Tensor], Tensor] | None = None,
) -> Gradients:
    """Return the gradients of `numbers`, which takes logits [R, V] to [R, m], by m backward passes.

    The logits are those at the last of `steps` positions from starts[r] on. upto, read: read(hidden [R, D])
    of the output of layer `upto` takes the place of the logits. Raises as `Host.branch`.
    """
    change = torch.zeros(len(rows), steps, host.d_v, requires_grad=True)
    with torch.enable_grad():
        output, _ = host.edited_layer(run, layer, head, rows, starts, change)
        hidden = host.layers_above(run, layer, rows, starts, output, upto=upto)[0][:, -1]
        logits = (read or host.logits)(hidden)
        sums = numbers(logits).sum(0)
    slopes = [torch.autograd.grad(x, (change, output, hidden), retain_graph=True) for x in sums]
    slopes = (torch.stack(x, 1) for x in zip(*slopes, strict=True))
    return Gradients(*slopes, output.detach(), hidden.detach(), logits.detach())


def predict_kl(
    host: Host, windows: Windows | Tensor, edit: Edit, *, layer: int, head: int, steps: int, readings: int = 1
) -> Tensor:
    """Return the predicted KL(native, edited) [R] in nats at the last of the `steps` tokens of `run_edited`.

    It is the KL at the estimated last hidden state (`Gradients.last_hidden`), where the log-probabilities of
    the `readings` native top tokens change linearly with the layer's output: one backward pass each, for all
    edits at a place. Raises ValueError for less than one reading, and as `run_edited`.
    """
    if not 1 <= readings <= host.vocabulary:
        raise ValueError(f"A KL is predicted from 1 to {host.vocabulary} readings, not from {readings}.")
    run, edits = run_under(host, windows, {(layer, head): edit})
    change, _ = head_change(host.factors(run, layer, head), edits[layer, head], steps)
    at = run, layer, head, edits[layer, head].rows, edits[layer, head].starts
    slopes = gradients(host, *at, steps, partial(top_log_probabilities, count=readings))
    with torch.no_grad():
        return kl(slopes.logits, host.logits(slopes.last_hidden(host.edited_layer(*at, change)[0])))


def top_log_probabilities(logits: Tensor, count: int) -> Tensor:
    """Return the `count` largest log-probabilities [R, count] of logits [R, V]."""
    return logits.log_softmax(-1).topk(count).values


def logit_gradients(
    host: Host, run: Run, layer: int, head: int, rows: Tensor, starts: Tensor, steps: int, tokens: Tensor
) -> Gradients:
    """Return the gradients of the logits of tokens [R, m] at the last of `steps` positions from starts[r] on.

    Raises ValueError for unknown tokens or another number of rows, and as `Host.branch`.
    """
    host.check_tokens(tokens)
    _check_count(tokens[:, 0], rows)
    return gradients(host, run, layer, head, rows, starts, steps, lambda logits: logits.gather(-1, tokens.clone()))


def logit_gradient(
    host: Host, run: Run, layer: int, head: int, rows: Tensor, starts: Tensor, steps: int, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient [R, steps, d_v] of each row's logit of tokens[r], and the native logits [R, V].

    The logit is at the last of `steps` positions from starts[r] on; the gradient is with respect to the
    head's output at each. Raises ValueError for unknown tokens or not one per row, and as `Host.branch`.
    """
    slopes = logit_gradients(host, run, layer, head, rows, starts, steps, tokens[:, None])
    return slopes.head[:, 0], slopes.logits


def _check_count(tokens: Tensor, rows: Tensor) -> None:
    if tokens.shape != rows.shape:
        raise ValueError(f"Each row takes the logit of one token: {len(rows)} rows, tokens {list(tokens.shape)}.")


@torch_defaults()
def gamma(factors: Factors, rows: Tensor, starts: Tensor, gradient: Tensor) -> Tensor:
    """Return Gamma [R, steps, d_k, d_v] of writes (scope "write") at every position from starts[r] on.

    gradient: as from `logit_gradient`. Raises ValueError for places outside the run.
    """
    factors.refuse_harvest()
    steps, influence = gradient.shape[1], []
    check_places(rows, torch.stack([starts, starts + steps - 1]), factors.key)
    for step in reversed(range(steps)):
        now = factors.at(rows, starts + step)
        direct = now.query[:, :, None] * gradient[:, step, None, :]
        if influence:
            direct = direct + factors.at(rows, starts + step + 1).transition_transposed(influence[-1])
        influence.append(direct)
    return torch.stack(influence[::-1], 1)


def cache_gamma(factors: Factors, rows: Tensor, t0: Tensor, gradient: Tensor) -> Tensor:
    """Return Gamma [R, d_k, d_v] of writes at t0 (scope "cache"); gradient: from t0 + 1 on."""
    after = gamma(factors, rows, t0 + 1, gradient)[:, 0]
    return factors.at(rows, t0 + 1).transition_transposed(after)


def reads(factors: Factors, rows: Tensor, t0: Tensor, steps: int, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return how the query at t0 + steps reads n key sides [n, d_k] at t0: by decay and exactly, [R, n].

    Raises ValueError where t0 or t0 + steps is outside the run.
    """
    check_places(rows, torch.stack([t0, t0 + steps]), factors.key)
    moved = keys.expand(len(rows), -1, -1)
    decay = torch.zeros_like(factors.log_decay[rows, t0])
    for step in range(1, steps + 1):
        now = factors.at(rows, t0 + step)
        moved, decay = now.transition(moved), decay + now.log_decay
    query = factors.query[rows, t0 + steps]
    return (query * decay.exp()) @ keys.T, (moved @ query[:, :, None])[..., 0]


def direct_path(host: Host, layer: int, head: int, values: Tensor, tokens: Tensor) -> Tensor:
    """Return <W_O value, W_U[token]>, [R, n], for values [n, d_v] and R tokens. Raises as `check_tokens`."""
    host.check_tokens(tokens)
    return host.unembedding()[tokens] @ host.output_projection(layer, head) @ values.T
