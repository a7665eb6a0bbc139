"""writesae.sae.sparsity: each rule against a loop, its gradients against finite differences."""

import pytest
import torch
from helpers import assert_close

from writesae.sae import sparsity
from writesae.sae.sparsity import ACTIVATIONS, batch_threshold

N, K = 7, 2


def pre_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, N, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def rule_of(name: str):
    torch.manual_seed(9)
    rule = ACTIVATIONS[name](N, K).double()
    for parameter in rule.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return rule


def spread(active) -> torch.Tensor:
    """The coefficients of all atoms, [..., N]."""
    return active.coefficients.new_zeros(*active.indices.shape[:-1], N).scatter(-1, *active)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_active_atoms_are_named_largest_first_and_are_the_same_in_any_order(name):
    rule, pre, bias = rule_of(name), pre_of(3, 4), torch.zeros(N).double()
    ordered, plain = rule(pre, bias), rule(pre, bias, ordered=False)
    assert torch.equal(spread(ordered), spread(plain))
    assert (ordered.coefficients[..., :-1] >= ordered.coefficients[..., 1:]).all()
    assert (plain.coefficients >= 0).all() and (plain.coefficients > 0).any()
    assert plain.indices.shape[-1] == (N if rule.every else K)
    if rule.every:
        assert torch.equal(plain.indices, torch.arange(N).expand(3, 4, N))


def test_topk_by_a_loop():
    pre = pre_of(5)
    for row, got in zip(pre, spread(rule_of("topk")(pre, None))):
        kept = sorted(range(N), key=lambda i: -row[i])[:K]
        assert got.tolist() == [max(row[i].item(), 0.0) if i in kept else 0.0 for i in range(N)]


@pytest.mark.parametrize("n", [5, 64, 1025])
def test_the_largest_of_a_row_are_those_of_a_sort_also_with_equal_values(n):
    rows = torch.randn(3, 4, n, generator=torch.Generator().manual_seed(10))
    rows[0, 1] = 0.5  # equal values leave a choice: any k of them are right
    rows[2, 3, : n // 2] = 9.0
    for k in (1, 3, n):
        values = rows.gather(-1, sparsity.largest(rows, k)).sort(descending=True).values
        assert torch.equal(values, rows.sort(descending=True).values[..., :k])
        assert all(len(set(row)) == k for row in sparsity.largest(rows, k).flatten(0, 1).tolist())


def test_batch_topk_keeps_k_a_token_on_average_in_training():
    rule, pre = rule_of("batch_topk"), pre_of(3, 5).requires_grad_()
    got = rule.coefficients(pre, None)
    kept = sorted(pre.detach().flatten().tolist(), reverse=True)[: K * 15]
    assert kept[-1] > 0, "the case that this test is meant for"
    assert sorted(got[got > 0].tolist(), reverse=True) == kept
    assert len(set((got > 0).sum(-1).flatten().tolist())) > 1, "not k in every token"
    assert_close(rule.threshold, sparsity.FOLLOW * kept[-1], "running threshold", 1e-6)
    got.sum().backward()
    assert torch.equal(pre.grad, (got > 0).double())


def test_batch_topk_uses_its_threshold_outside_training():
    rule, pre = rule_of("batch_topk").eval(), pre_of(3, 5)
    rule.start(pre, None)
    threshold = rule.threshold.item()
    assert threshold == sorted(pre.flatten().tolist(), reverse=True)[K * 15 - 1]
    one = rule.coefficients(pre[0, :1], None)
    assert torch.equal(one, pre[0, :1] * (pre[0, :1] >= threshold)), "a token on its own, as among others"
    assert rule.threshold.item() == threshold, "nothing is learnt"


def test_a_batch_with_few_positive_values_keeps_those():
    assert batch_threshold(-pre_of(4).abs(), K) == 0
    pre = (-pre_of(4).abs()).requires_grad_()
    assert not rule_of("batch_topk").coefficients(pre, None).any()


def test_jumprelu_and_its_kernel_gradients():
    rule, pre = rule_of("jumprelu"), pre_of(40).requires_grad_()
    theta = rule.threshold().detach()
    by_level = sparsity.PACE * theta  # d theta / d level
    got = rule.coefficients(pre, None)
    assert torch.equal(got.detach(), pre.detach() * (pre.detach() > theta))
    weight = torch.randn(40, N, dtype=torch.float64)
    by_pre, slope = torch.autograd.grad((got * weight).sum(), (pre, rule.level))
    assert torch.equal(by_pre, weight * (got > 0))
    near = (pre - theta).abs() < sparsity.WIDTH / 2
    assert near.any()
    expected = -(weight * near * theta / sparsity.WIDTH).sum(0)
    assert_close(slope, expected * by_level, "gradient of the thresholds", 1e-12)
    active = (pre > theta).double().sum(-1).mean()
    penalty = rule.penalty(pre)
    assert penalty.item() == pytest.approx(((active / K - 1) ** 2).item())
    slope = torch.autograd.grad(penalty, rule.level)[0]
    expected = 2 * (active / K - 1) / K * -(near.double() / sparsity.WIDTH).sum(0) / 40
    assert_close(slope, expected * by_level, "gradient of the penalty", 1e-12)


def test_the_kernel_gradient_is_that_of_the_mean_over_many_values():
    """The estimate of Rajamanoharan et al. against finite differences, for evenly spaced pre-activations."""
    pre = torch.linspace(-0.2, 0.4, 600_001, dtype=torch.float64)[:, None]
    theta = torch.tensor([0.1], dtype=torch.float64, requires_grad=True)
    for step in (False, True):
        got = torch.autograd.grad(sparsity._Jump.apply(pre, theta, step).mean(), theta)[0]
        above, below = (sparsity._Jump.apply(pre, theta.detach() + d, step).mean() for d in (1e-3, -1e-3))
        assert_close(got, ((above - below) / 2e-3)[None], f"step {step}", 1e-3)


def test_a_soft_gate_by_a_loop():
    rule, pre, bias = rule_of("soft_gated"), pre_of(4), torch.randn(N).double()
    for row, got in zip(pre, rule.coefficients(pre, bias)):
        scale, offset = rule.log_scale.detach().exp(), rule.offset.detach()
        size = [scale[i] * (p - bias[i]) + offset[i] for i, p in enumerate(row)]
        wanted = [max(float(m), 0.0) / (1 + (-p / sparsity.TAU).exp().item()) for p, m in zip(row, size)]
        assert_close(got, torch.tensor(wanted).double(), "coefficients", 1e-6)


def test_gated_by_its_definition():
    rule, pre, bias = rule_of("gated"), pre_of(6).requires_grad_(), torch.randn(N).double()
    got = rule.coefficients(pre, bias)
    for t in range(6):
        for i in range(N):
            filtered = pre[t, i] - bias[i]
            magnitude = max(0.0, (rule.log_scale[i].exp() * filtered + rule.offset[i]).item())
            assert got[t, i].item() == pytest.approx(magnitude if pre[t, i] > 0 else 0.0)
    before, active = rule.l1.item(), (pre > 0).sum(-1).double().mean().item()
    assert rule.penalty(pre).item() == pytest.approx(before * pre.detach().relu().sum(-1).mean().item())
    pace = sparsity.L1_PACE * max(-1, min(1, active / K - 1))
    assert rule.l1.item() == pytest.approx(before * (1 + pace)) and active > K
    rule.eval().penalty(pre)
    assert rule.l1.item() == pytest.approx(before * (1 + pace)), "nothing is learnt outside training"


@pytest.mark.parametrize("name", ["batch_topk", "jumprelu", "gated"])
def test_k_atoms_a_token_are_active_at_the_start(name):
    rule, filtered, bias = ACTIVATIONS[name](N, K).double(), pre_of(50), torch.zeros(N).double()
    rule.start(filtered, bias)
    active = (rule.coefficients(filtered + bias, bias) > 0).sum(-1).double().mean()
    assert active == pytest.approx(K, abs=0.03)


def test_restarted_atoms_are_as_easily_active_as_the_median():
    jump, gated, bias = rule_of("jumprelu"), rule_of("gated"), torch.arange(-9.0, -2.0)
    middle, before = jump.level.median().item(), jump.level.clone()
    jump.restart(torch.tensor([0, 3]), bias)
    assert jump.level[[0, 3]].tolist() == [middle] * 2 and torch.equal(jump.level[4:], before[4:])
    bias[[0, 3]] = 0
    gated.restart(torch.tensor([0, 3]), bias)
    assert bias[0] == bias[3] < 0 and bias[1] == -8
    assert not gated.log_scale[[0, 3]].any() and gated.log_scale[1] != 0
