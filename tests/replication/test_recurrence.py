"""Page 19: its numbers by hand, on random writes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from replication.pages import recurrence
from replication.pages.recurrence import Kind
from writesae.evaluate.detection import detect
from writesae.recurrence import Factors
from writesae.sae.config import Architecture
from writesae.sae.model import SAE
from writesae.text import Windows

N, T, D_K, D_V, ENTRIES = 6, 40, 5, 7, 9
SAES = Kind("sae", "write", "none")


def factors(seed: int) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    key, added = (torch.randn(N, T, d, generator=generator) for d in (D_K, D_V))
    return Factors(query=None, key=key, added=added, log_decay=torch.zeros(N, T), effective=added)


def sae_of(seed: int) -> SAE:
    torch.manual_seed(seed)
    return SAE(Architecture(n_atoms=ENTRIES, k=2, centre="none"), D_K, D_V)


@pytest.fixture
def given():
    tokens = torch.randint(4, (N, T), generator=torch.Generator().manual_seed(5))
    windows = Windows(tokens, torch.tensor([0, 0, 1, 1, 2, 3]))
    return dict(training=factors(1), factors=factors(2), windows=windows, write="added", first=2, seed=3, atoms=4)


def test_what_fires_by_a_loop_over_places():
    history, sae = factors(2).history("write", "added"), sae_of(0)
    book = torch.randn(ENTRIES, D_K, D_V, generator=torch.Generator().manual_seed(4))
    of_sae, of_book = recurrence.fires(sae, history), recurrence.fires(book, history)
    for n, t in ((0, 0), (3, 17), (5, 39)):
        write = history.key[n, t, :, None] * history.value[n, t]
        assert (
            of_book[n, t]
            == torch.stack([(F.normalize(x.flatten(), dim=0) * write.flatten()).sum() for x in book]).abs().argmax()
        )
        indices, coefficients = sae.encode(write)
        assert of_sae[n, t] == (indices[0] if coefficients[0] > 0 else -1)


def test_entries_of_the_same_dictionary_come_back_and_others_do_not(given):
    same = recurrence.examine(SAES, {SAES: {7: sae_of(0), 8: sae_of(0)}}, [7, 8], **given)
    assert (same.recurs == 1).all() and same.best.to_numpy() == pytest.approx(1)
    other = recurrence.examine(SAES, {SAES: {7: sae_of(0), 8: sae_of(1)}}, [7, 8], **given)
    assert other.recurs.max() == 0 and other.best.max() < 0.9
    (key, value), others = sae_of(0).atoms(), sae_of(1).atoms()
    row = other[other.seed == 7].iloc[1]
    wanted = max(abs((key[row.atom] @ k) * (value[row.atom] @ v)) for k, v in zip(*others))
    assert row.best == pytest.approx(wanted.item(), rel=1e-5)
    labels = recurrence.fires(sae_of(0), given["factors"].history("write", "added"))
    assert row.firings == (labels[:, 2:] == row.atom).sum()


def test_at_most_so_many_entries_are_examined_on_the_other_half_of_the_passages(given):
    table = recurrence.examine(SAES, {SAES: {7: sae_of(0), 8: sae_of(1)}}, [7, 8], **given)
    one = table[table.seed == 8].dropna(subset="auc_all")
    assert 0 < len(one) <= given["atoms"] < len(table[table.seed == 8])
    fit = recurrence.fitting(given["windows"].passage, 3)
    assert fit[0] == fit[1] and fit[2] == fit[3] and len(given["windows"].passage[fit].unique()) == 2
    labels = recurrence.fires(sae_of(1), given["factors"].history("write", "added"))
    wanted = detect(labels, given["windows"].tokens, fit, one.atom.to_numpy(), 2).auc_all
    np.testing.assert_allclose(one.sort_values("atom").auc_all, wanted)


def test_codebooks(given):
    writes = factors(1).history("write", "added")
    raw = recurrence.codebook(Kind("raw", "write", "none"), writes, ENTRIES, 3)
    raw = raw[0][:, :, None] * raw[1][:, None]
    units = F.normalize((writes.key[..., :, None] * writes.value[..., None, :]).flatten(0, 1).flatten(1), dim=-1)
    assert ((raw.flatten(1) @ units.T).amax(1) > 1 - 1e-5).all() and len(raw) == ENTRIES
    noise = [recurrence.codebook(Kind("random", "write", "none"), writes, ENTRIES, s) for s in (3, 4)]
    assert not torch.equal(noise[0][0], noise[1][0])
    history, matrices = factors(2).history("write", "added"), noise[0][0][:, :, None] * noise[0][1][:, None]
    assert torch.equal(recurrence.fires(noise[0], history), recurrence.fires(matrices, history))
    centroids = recurrence.codebook(Kind("kmeans", "write", "none"), writes, ENTRIES, 3)
    assert centroids.shape == (ENTRIES, D_K, D_V)
    one, other = centroids[2].flatten(), matrices[4].flatten()
    assert recurrence.cosines(centroids, matrices)[2, 4] == pytest.approx(
        (one @ other / one.norm() / other.norm()).item(), rel=1e-5
    )


def test_a_summary(given):
    saes = {SAES: {7: sae_of(0), 8: sae_of(0)}}
    kinds = [SAES, *(Kind(name, "write", "none") for name in ("raw", "random"))]
    table = recurrence.pd.concat([recurrence.examine(kind, saes, [7, 8], **given) for kind in kinds])
    table = table.assign(host="toy")
    summary = recurrence.summarise(table, 50, 0).set_index("dictionary")
    assert summary.recurs["sae"] == summary.recurs_by_firing["sae"] == 1 and summary.trainings["sae"] == 2
    sae = table[table.dictionary == "sae"]
    assert summary.auc_all["sae"] == pytest.approx(sae.groupby("seed").auc_all.mean().mean())
    assert summary.n["sae"] == len(sae) // 2 and summary.examined["sae"] == sae.auc_all.notna().sum() // 2
    assert recurrence.readable(summary.reset_index(), "toy")["come back (%)"].iloc[0].startswith("100 [")
