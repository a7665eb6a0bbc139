"""Page 90 with other models, texts, cells and words: what it computes with, and where it writes."""

import json
import shutil
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from replication.pages import own_model
from replication.study import paths
from replication.study.paths import Paths
from writesae.evaluate.install import word_token
from writesae.files import read_sidecar
from writesae.hosts.load import load_host

WORDS = ["a list of values in the list and the value of a list(3)"] * 50


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a copy of an embedded host in `my model [1]` and a text in notes/."""
    monkeypatch.setenv("WRITESAE_OUTPUT", str(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(paths.ROOT / "models" / "mamba2", tmp_path / "my model [1]")
    (tmp_path / "notes").mkdir()
    for number in range(20):
        (tmp_path / "notes" / f"{number}.txt").write_text(f"A note with the number {number}. " * 20)
    return tmp_path


def choose(**other):
    return own_model.choose(other.pop("profile", "smoke"), **own_model.DEFAULTS | other)


def test_the_page_has_these_defaults():
    page = nbformat.read(paths.ROOT / "notebooks" / "90_your_own_model.ipynb", as_version=4)
    (cell,) = (cell for cell in page.cells if "parameters" in cell.metadata.get("tags", []))
    values = {}
    exec(cell.source, values)
    assert own_model.DEFAULTS | dict(profile="mini") == {name: x for name, x in values.items() if name[0] != "_"}


def test_the_default_choice_writes_where_make_looks_for_it(here):
    for same in (
        {},
        dict(layer="4", head=3.0, tokenizer="", text=""),
        dict(model=paths.ROOT / "models/gated_deltanet/"),
    ):
        choice = choose(**same)
        assert choice.study.paths == Paths("smoke") and choice.cell == (4, 3)
        assert choice.origin["model"] == "models/gated_deltanet"  # no path of this machine


def test_every_other_choice_has_a_folder_of_its_own(here):
    kept = choose().write(pd.DataFrame(dict(question=["x"], value=[1.0])), target="write")
    others = [dict(layer=5), dict(head=1), dict(word="value"), dict(text="notes"), dict(model="my model [1]")]
    others += [dict(model="my model [1]", tokenizer="models/gated_deltanet"), dict(profile="mini", layer=5)]
    folders = []
    for other in others:
        choice = choose(**other)
        folders.append(choice.study.paths.results)
        choice.write(pd.DataFrame(dict(question=["x"], value=[2.0])), target="write")
    assert len(set(folders)) == len(others)
    assert {folder.parent for folder in folders} == {here / "out" / "results" / "own_models"}
    assert folders[4].name.startswith("my_model_1_-L4-H3-")
    assert choose().study.table("own_model").equals(kept)
    assert choose(layer="5", head="3").study.paths.results == folders[0]  # the same choice, in other types


def test_the_sidecar_says_what_was_chosen_and_the_lock_is_taken(here):
    choice = choose(model="my model [1]", text="notes/*.txt", layer="2", head=1, word=True)
    assert list(choice.corpus.texts("sae")) and choice.host.family == "mamba2" and choice.cell == (2, 1)
    choice.write(pd.DataFrame(dict(question=["x"], value=[2.0])), target="write")
    record = read_sidecar(choice.study.paths.results / "own_model.csv")
    wanted = dict(model=f"{here}/my model [1]", tokenizer=None, text=f"{here}/notes/*.txt", layer=2, head=1)
    wanted |= dict(word="True", token=choice.token, host="my model [1]", revisions={}, profile="smoke")
    assert {name: record[name] for name in wanted} == wanted and record["seconds"] > 0
    assert choice.host.tokenizer.decode([choice.token]) == " True"
    other = "from replication.pages.own_model import *; import sys, json; "
    other += "from replication.study import lock; lock.writing.__defaults__ = (0.1,); choose('smoke', **json.loads(sys.argv[1]))"
    same = own_model.DEFAULTS | dict(model="my model [1]", text="notes/*.txt", layer=2, head=1, word="True")
    done = subprocess.run([sys.executable, "-c", other, json.dumps(same)], capture_output=True, encoding="utf-8")
    assert "LockError: Another run" in done.stderr


WRONG = [
    (dict(layer=3), "Layer 3 of gated_deltanet is not recurrent: choose one of 0, 1, 2, 4, 5, 6."),
    (dict(layer=-1), "Layer -1 of gated_deltanet is not recurrent"),
    (dict(head=4), "gated_deltanet has no head 4: choose one of 0 to 3."),
    (dict(layer=None), "layer must be a whole number, such as 4, and is None."),
    (dict(layer=True), "layer must be a whole number, such as 4, and is True."),
    (dict(head="first"), "head must be a whole number, such as 3, and is 'first'."),
    (dict(head=2.5), "head must be a whole number, such as 3, and is 2.5."),
    (dict(head="inf"), "head must be a whole number, such as 3, and is 'inf'."),
    (dict(model=None), "model must be a folder or a Hub id, such as models/gated_deltanet."),
    (dict(model=""), "model must be a folder or a Hub id"),
    (dict(model="no such/folder here"), "There is no folder no such/folder here"),
    (dict(word=" "), "Type a target word"),
    (dict(word="electroencephalography"), "The target must be one token, and 'electroencephalography' is"),
    (dict(profile="other"), "There is no profile 'other'"),
]


@pytest.mark.parametrize(("other", "sentence"), WRONG)
def test_a_choice_that_does_not_fit_is_one_sentence(here, other, sentence):
    with pytest.raises((ValueError, OSError)) as error:
        choose(**other)
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)
    assert not (here / "out" / "results").exists()


# Words


def sentencepiece():
    """A tokenizer as Llama's and Mistral's: a blank is put before every text."""
    blanks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(blanks)
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    inner.decoder = decoders.Replace("▁", " ")
    inner.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def byte_level():
    """A tokenizer as GPT-2's and Qwen's: a blank belongs to the word behind it."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(WORDS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("tokenizer", [sentencepiece(), byte_level()], ids=["sentencepiece", "byte level"])
@pytest.mark.parametrize("word", ["list", " list", "value"])
def test_a_word_is_the_token_that_it_is_inside_a_text(tokenizer, word):
    token = word_token(tokenizer, word)
    text = tokenizer(f"the {word.strip()} of", add_special_tokens=False)["input_ids"]
    assert token in text and tokenizer.decode([token]).strip() == word.strip()
    with pytest.raises(
        ValueError, match=r"must be one token, and 'listing' is 4 \('lis', 't', 'in', .*\): type a more common"
    ):
        word_token(tokenizer, "listing")


def test_a_word_that_is_one_token_only_without_a_space_is_that_token():
    digits = sentencepiece()  # '▁' and '3'
    assert digits.convert_ids_to_tokens(word_token(digits, "3")) == "3"
    with pytest.raises(ValueError, match="must be one token, and ' 3' is 2"):
        word_token(digits, " 3")


def test_a_word_of_each_embedded_host_is_found_in_a_text():
    for name in ("gated_deltanet", "rwkv7"):
        tokenizer = load_host(paths.ROOT / "models" / name).tokenizer
        for word in (" list", "None", "(", "3"):
            assert word_token(tokenizer, word) in tokenizer(f"a {word}", add_special_tokens=False)["input_ids"]


# The end of the page


def test_the_verdict_has_the_numbers():
    rates = [(f"{name} beats deletion", x, 160, x - 0.1, x + 0.1) for name, x in (("atom", 0.4), ("random", 0.2))]
    rows = [*rates, ("lift of the word, 3x along gamma", 1.2, 1, None, None)]
    rows += [("R2 of paper at 0.1", 0.1, 9, None, None), ("R2 of exact at 0.1", 0.95, 9, None, None)]
    table = pd.DataFrame(rows, columns=["question", "value", "n", "ci_low", "ci_high"])
    first, second, third = own_model.verdict(table).splitlines()
    assert first == "The edited run reads what was predicted: R2 is 0.950 at 0.1 native write norms (n = 9)."
    assert "on 40% [30, 50] of 160 firings, and a random atom on 20% [10, 30]." in second
    assert third.endswith("of the word by 1.20 nats in the mean over 1 prompts.")
    failed = own_model.verdict(table.replace(0.95, 0.5).assign(ci_low=0.1, ci_high=2))
    assert failed.startswith("The edited run does not read") and "1.20 [0.10, 2.00] nats" in failed


def test_no_firing_is_one_sentence_and_few_are_all_taken():
    firings = pd.DataFrame(dict(window=0, position=range(5), atom=[0, 0, 1, 1, 2], coefficient=1.0))
    assert len(own_model.draw(firings, 160, seed=3)) == 5
    with pytest.raises(ValueError, match="No atom fires on the held-out windows: give more text, or another cell"):
        own_model.draw(firings[:0], 160, seed=3)
