"""writesae.evaluate.detection: scores against scikit-learn, atoms whose rule is known, and noise."""

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from writesae.evaluate.detection import _rates, auc, detect


def test_the_area_is_that_of_scikit_learn_also_with_equal_scores():
    rng = np.random.default_rng(0)
    scores, happened = rng.integers(0, 6, (200, 3)) / 6, rng.random((200, 3)) < 0.2
    wanted = [roc_auc_score(happened[:, i], scores[:, i]) for i in range(3)]
    np.testing.assert_allclose(auc(scores, happened), wanted, atol=1e-12)


def test_rates_by_a_loop():
    rng = np.random.default_rng(1)
    fit, test, fired, coarser = (
        rng.integers(0, 5, 40),
        np.array([0, 3, 9]),
        rng.random((40, 2)) < 0.3,
        rng.random((3, 2)),
    )
    wanted = [
        [(fired[fit == key, i].sum() + 2 * coarser[row, i]) / ((fit == key).sum() + 2) for i in range(2)]
        for row, key in enumerate(test)
    ]
    np.testing.assert_allclose(_rates(fit, fired, test, coarser), wanted)


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(7, (40, 50), generator=generator), torch.arange(40) % 3 > 0, generator


def test_an_atom_of_a_token_a_pair_or_a_place_is_found_by_that_view(text):
    tokens, fit, generator = text
    labels = torch.randint(3, 5, tokens.shape, generator=generator)  # atoms 3 and 4: noise
    labels[tokens == 2] = 0
    labels[:, 1:][(tokens[:, 1:] == 4) & (tokens[:, :-1] == 1)] = 1
    labels[:, 30:34] = 2
    found = detect(labels, tokens, fit, range(6), first=2).set_index("atom")
    assert set(found.index) == {0, 1, 2, 3, 4}  # atom 5 never fires
    assert found.n_test[0] == (labels[~fit][:, 2:] == 0).sum()
    assert found.auc_token[0] > 0.95 and found.auc_position[0] < 0.65
    assert found.auc_pair[1] > 0.95 and found.auc_pair[1] > found.auc_token[1] + 0.05
    assert found.auc_position[2] > 0.9 > 0.7 > found.auc_token[2] and found.auc_all[2] > 0.9
    noise = torch.randint(5, tokens.shape, generator=generator)
    assert (detect(noise, tokens, fit, range(5)).auc_all - 0.5).abs().max() < 0.12


def test_rates_come_from_the_other_windows_only(text):
    tokens, fit, generator = text
    labels = torch.randint(2, tokens.shape, generator=generator)
    again = labels.clone()
    again[~fit] = torch.where(tokens[~fit] == 2, 0, 1)  # a rule that holds in the test windows alone
    assert (detect(again, tokens, fit, [0, 1]).auc_token - 0.5).abs().max() < 0.2
    with pytest.raises(ValueError, match="both parts"):
        detect(labels, tokens, torch.ones(40, dtype=torch.bool), [0, 1])
