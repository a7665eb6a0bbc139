"""The examination of a model: what it finds in healthy models and in broken ones, its files, and the docs' table."""

import copy
import json
from pathlib import Path

import pytest
import torch
from supported_models import PAGE, rows_of
from supported_models import test_each_class_is_in_the_table as test_each_class_is_in_the_table

from writesae import __main__ as command
from writesae.edit import edited_hidden, kl, make_edit, run_edited
from writesae.evaluate import check
from writesae.evaluate.cells import cost_of_deletions
from writesae.hosts import load
from writesae.shift import predict_shift

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_has_the_classes_of_the_registry():
    classes = {name for family in load.FAMILIES for name in load.adapter(family).model_classes}
    assert set(rows_of(PAGE.read_text(encoding="utf-8"))) == classes


def broken(host, change):
    """Return a copy of a host whose adapter computes something else than its model."""
    host = copy.deepcopy(host)
    change(host)
    return host


def scale_outputs(host):
    mix = host.mix

    def wrong(layer, hidden, past, positions):
        record = mix(layer, hidden, past, positions)
        record.outputs = record.outputs * 1.01
        return record

    host.mix = wrong


def forget_convolution(host):
    windows_at = host.windows_at
    host.windows_at = lambda *at: {name: 0 * x for name, x in windows_at(*at).items()}


@pytest.mark.parametrize(
    ("change", "found"), [(scale_outputs, {"whole sequence", "fp64 loop"}), (forget_convolution, {"restart"})]
)
def test_what_is_wrong_is_found(gated_deltanet, tokens, change, found):
    host = broken(gated_deltanet, change)
    table = check.compare(host, host.run(tokens[:, :70])).set_index("comparison")
    ours = table[table.whose == "ours"]
    assert set(ours.index[ours.verdict == "differs"]) == found
    assert (ours.note != "").sum() == len(found)


@pytest.mark.parametrize(
    ("forgotten", "found"),
    [
        ("attention_mask", {"left padding", "left padding alone", "packing"}),
        ("past_key_values", {"cache in parts", "cache by token", "packing"}),
    ],
)
def test_a_library_that_forgets_an_option_is_found(gated_deltanet, tokens, monkeypatch, forgotten, found):
    library = check.library

    def forgetful(host, tokens, **options):
        options.pop(forgotten, None)
        return library(host, tokens, **options)

    monkeypatch.setattr(check, "library", forgetful)
    table = check.compare(gated_deltanet, gated_deltanet.run(tokens[:, :70]))
    assert set(table.comparison[table.verdict == "differs"]) == found


def test_the_closed_form_is_that_of_predict_shift(gated_deltanet, tokens):
    host, cell = gated_deltanet, (1, 2)
    run = host.run(tokens)
    rows, at = check.places(run, check.PLACES)
    assert at.min() >= check.FIRST and at.max() < tokens.shape[1] - 1
    write, native = host.factors(run, *cell).at(rows, at), host.logits(run.final[rows, at + 1])
    edit = make_edit(rows, at, write.key[:, None], -write.added[:, None])
    token, place = native.argmax(-1), dict(layer=1, head=2, steps=2)
    shift = (run_edited(host, tokens, edit, **place)[:, -1] - native).gather(-1, token[:, None])[:, 0]
    predicted = predict_shift(host, tokens, edit, token, **place)
    wanted = 1 - (shift - predicted).square().sum() / (shift - shift.mean()).square().sum()
    assert check.closed_form(host, run, cell) == pytest.approx(wanted.item(), abs=1e-4)


def test_an_error_of_the_library_is_a_verdict(gated_deltanet, tokens, monkeypatch):
    def broken(host, run):
        raise RuntimeError("no kernel image")

    comparison = check.COMPARISONS["left padding"]._replace(measure=broken)
    monkeypatch.setattr(check, "COMPARISONS", {"left padding": comparison})
    row = check.compare(gated_deltanet, gated_deltanet.run(tokens)).iloc[0]
    assert (row.verdict, row.note) == ("fails", "RuntimeError: no kernel image")


def test_the_cost_of_a_deletion_is_that_of_an_edited_run(host, tokens):
    run, (layer, head) = host.run(tokens), (host.recurrent_layers[1], 2)
    rows, positions = torch.tensor([2, 0, 1]), torch.tensor([20, 33, 60])
    table = cost_of_deletions(host, run, [(host.recurrent_layers[0], 0), (layer, head)], rows, positions)
    part = table[(table.layer == layer) & (table["head"] == head)]
    assert part.window.tolist() == rows.tolist() and part.position.tolist() == positions.tolist()
    write = host.factors(run, layer, head).at(rows, positions)
    for number in range(3):
        one = slice(number, number + 1)
        edit = make_edit(rows[one], positions[one], write.key[one, None], -write.added[one, None])
        final = edited_hidden(host, run, layer, head, edit, 2)[:, 1]
        native = run.final[rows[one], positions[one] + 1]
        wanted = kl(host.logits(native), host.logits(final)).item()
        assert wanted > 1e-9
        assert part.kl.iloc[number] == pytest.approx(wanted, rel=1e-3)
    for row, position in ((3, 5), (-1, 5), (0, 89), (0, -1)):
        with pytest.raises(ValueError, match="Places are in 3 windows and have a token after them: positions 0 to 88"):
            cost_of_deletions(host, run, [(layer, head)], torch.tensor([row]), torch.tensor([position]))


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    """The command's exit status and its folder, on an embedded host."""
    folder = tmp_path_factory.mktemp("check")
    arguments = ["check", str(ROOT / "models" / "mamba2"), "--windows", "3", "--length", "64", "--cells", "5"]
    return command.main([*arguments, "--out", str(folder)]), folder


def test_the_command_says_and_stores_what_it_found(examined, capsys):
    status, folder = examined
    assert status == 0
    stored = json.loads((folder / "check.json").read_text(encoding="utf-8"))
    assert stored["model"]["model_class"] == "Mamba2ForCausalLM" and stored["model"]["windows"] == 3
    assert [row["comparison"] for row in stored["comparisons"]] == list(check.COMPARISONS)
    assert len(stored["cells"]) == 5 and {row["added_write_rank"] for row in stored["cells"]} == {1}
    assert all(value > 0 for value in stored["estimates"].values())
    assert (folder / "check.png").stat().st_size > 20_000


def test_bad_input_gets_one_sentence(capsys, monkeypatch, gated_deltanet, tokens):
    assert command.main(["check", "nowhere/at/all"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("check failed: There is no folder nowhere/at/all") and said.count("\n") == 1
    with pytest.raises(ValueError, match="windows of at least 64 tokens, and these have 40"):
        check.examine(gated_deltanet, tokens[:, :40])
    with pytest.raises(ValueError, match="at least one cell, not 0"):
        check.examine(gated_deltanet, tokens, cells=0)


def test_rounding_is_the_kl_of_a_copy_in_bfloat16(gated_deltanet, tokens):
    half = type(gated_deltanet)(copy.deepcopy(gated_deltanet.model).bfloat16(), None, "half")
    native, rounded = (host.logits(host.run(tokens).final) for host in (gated_deltanet, half))
    wanted = kl(native, rounded).median().item()
    assert wanted > 1e-6
    assert check.rounding(gated_deltanet, gated_deltanet.run(tokens)) == pytest.approx(wanted, rel=1e-6)
