"""Corpora other than the docstrings: OpenWebText's format, JSONL and folders; splits, windows and errors."""

import json
import random
import sys
from types import SimpleNamespace

import pytest
from helpers import FakeHub

from replication.study import paths
from replication.study.profile import load_profile
from replication.study.study import Study, split_windows
from writesae.files import read_sidecar
from writesae.hosts.rwkv7_tokenizer import WorldTokenizer
from writesae.text import SEPARATORS, SPLITS, Corpus, as_text, cut_windows, end_of_text, token_ids

LENGTH = 8
# each word names its document and place
TEXTS = [" ".join(f"{n}.{i}" for i in range(random.Random(n).randrange(2, 40))) for n in range(200)]


class Words:
    """Each token names its document and place: the word "7.3" (document 7, place 3) is token 7003."""

    eos_token_id = -1

    def __call__(self, text, **_):
        pairs = [word.split(".") for word in text.split()]
        return dict(input_ids=[1000 * int(n) + int(i) for n, i in pairs])


HOST = SimpleNamespace(tokenizer=Words())


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """The cache of `datasets` is in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def parquet(path, texts, column="text"):
    import pyarrow
    from pyarrow.parquet import write_table

    path.parent.mkdir(parents=True, exist_ok=True)
    write_table(pyarrow.table({column: texts, "other": list(range(len(texts)))}), path, row_group_size=10)
    return path


@pytest.fixture
def folder(tmp_path):
    """The same documents in the same order, in each supported format."""
    half = len(TEXTS) // 2
    # the layout of the Hub's parquet branch
    shards = tmp_path / "openwebtext" / "plain_text" / "partial-train"
    parquet(shards / "0000.parquet", TEXTS[:half])
    parquet(shards / "0001.parquet", TEXTS[half:])
    parquet(tmp_path / "one.parquet", TEXTS)
    lines = "\n".join(json.dumps(dict(id=n, text=text)) for n, text in enumerate(TEXTS))
    (tmp_path / "lines.jsonl").write_text(lines + "\n\n")
    for n, text in enumerate(TEXTS):
        path = tmp_path / "texts" / f"{n // 100}" / f"{n:04d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def corpora(folder):
    named = dict(openwebtext=dict(dataset=str(folder / "openwebtext")), parquet=dict(path=str(folder / "one.parquet")))
    named |= dict(jsonl=dict(path=str(folder / "lines.jsonl")), folder=dict(path=str(folder / "texts")))
    named |= dict(pattern=dict(path=str(folder / "texts" / "**" / "0*.*")))
    named |= dict(shards=dict(path=str(folder / "openwebtext" / "**" / "*.parquet")))
    return {name: Corpus(**fields) for name, fields in named.items()}


def test_every_form_gives_the_same_documents(folder):
    for name, corpus in corpora(folder).items():
        assert list(corpus.documents()) == TEXTS, name
        sae, heldout = list(corpus.texts("sae")), list(corpus.texts("heldout"))
        assert sorted(sae + heldout) == sorted(TEXTS), name
        assert len(TEXTS) * 0.1 < len(heldout) < len(TEXTS) * 0.3


def test_windows_of_every_form_are_the_same_and_never_cross_documents_or_splits(folder):
    first = None
    for corpus in corpora(folder).values():
        found = {split: split_windows(HOST, split, LENGTH, 20, corpus) for split in SPLITS}
        first = first or found
        for split, windows in found.items():
            assert windows.tokens.equal(first[split].tokens) and windows.passage.equal(first[split].passage)
            assert len(windows) == 20 and windows.tokens.shape[1] == LENGTH
            assert (windows.tokens[:, 1:] // 1000 == windows.tokens[:, -1:] // 1000).all()
            texts = list(corpus.texts(split))
            named = [int(texts[n].split(".")[0]) for n in windows.passage]
            assert named == (windows.tokens[:, -1] // 1000).tolist()
        documents = [set((windows.tokens[:, -1] // 1000).tolist()) for windows in found.values()]
        assert not documents[0] & documents[1]


def test_no_more_documents_are_read_than_the_windows_need():
    read = []
    texts = (read.append(n) or text for n, text in enumerate(TEXTS))
    windows = cut_windows(Words(), texts, LENGTH, limit=10)
    assert read[-1] == windows.passage[-1] < len(TEXTS) - 1
    assert windows.kept() == len(windows.passage.unique()) / len(read)


def test_a_stream_reads_no_further_file(folder):
    parquet(folder / "openwebtext/plain_text/partial-train/0001.parquet", TEXTS[100:]).write_bytes(b"damaged")
    corpus = corpora(folder)["openwebtext"]
    assert len(split_windows(HOST, "sae", LENGTH, 20, corpus)) == 20
    with pytest.raises(ValueError, match=r"openwebtext cannot be read \(ArrowInvalid: .*Parquet"):
        list(corpus.documents())


def test_a_repeated_text_counts_once(folder):
    (folder / "lines.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in TEXTS[:9] * 3))
    corpus = Corpus(path=str(folder / "lines.jsonl"))
    assert sorted([*corpus.texts("sae"), *corpus.texts("heldout")]) == sorted(TEXTS[:9])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'{"text": "cut', r"lines.jsonl, line 2 is not JSON"),
        (b'{"text": "\xff"}', r"lines.jsonl, line 2 is not JSON"),
        (b'["text"]', r"line 2 has no field 'text': it is no object"),
        (b'{"body": "x", "id": 1}', r"line 2 has no field 'text': it has body, id"),
        (b'{"text": 7}', r"line 2: the text is a int, not a string"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, sentence):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=sentence):
        list(Corpus(path=str(path)).documents())


def test_what_is_missing_or_too_small_is_one_sentence(folder):
    with pytest.raises(ValueError, match="one.parquet has no column 'body': it has text, other"):
        list(Corpus(path=str(folder / "one.parquet"), column="body").documents())
    with pytest.raises(ValueError, match="row 1: the text is a int"):
        list(Corpus(path=str(folder / "one.parquet"), column="other").documents())
    with pytest.raises(ValueError, match=r"passages of .*lines.jsonl, split heldout, give \d+ windows of 8 .* 900 are"):
        split_windows(HOST, "heldout", LENGTH, 900, Corpus(path=str(folder / "lines.jsonl")))
    with pytest.raises(FileNotFoundError, match="no file or folder .*/nowhere"):
        list(Corpus(path=str(folder / "nowhere")).documents())
    (folder / "none").mkdir()
    with pytest.raises(ValueError, match="none is empty: it holds no document"):
        list(Corpus(path=str(folder / "none")).documents())
    (folder / "none.jsonl").write_text("\n")
    for name in ("none.jsonl", "no*.jsonl", "no*.parquet", "no*.md"):
        with pytest.raises(ValueError, match="is empty: it holds no document"):
            list(Corpus(path=str(folder / name)).documents())
    with pytest.raises(FileNotFoundError, match="none doesn't contain any data files"):
        list(Corpus(dataset=str(folder / "none")).documents())
    with pytest.raises(ValueError, match="Bad split: test"):
        list(Corpus(dataset=str(folder / "openwebtext"), split="test").documents())
    (folder / "texts" / "0" / "0050.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"0050.txt is not text in UTF-8: byte 3"):
        list(Corpus(path=str(folder / "texts")).documents())
    with pytest.raises(ValueError, match="give a folder of .txt files, a pattern"):
        list(Corpus(path=str(folder / "texts" / "0" / "0001.txt")).documents())
    with pytest.raises(ValueError, match="no split 'host'"):
        next(Corpus(path=str(folder / "texts")).texts("host"))


SHA = FakeHub.SHA


@pytest.mark.parametrize(
    ("answers", "error", "sentence"),
    [
        ({"": dict(status_code=404, headers={"X-Error-Code": "RepoNotFound"})}, FileNotFoundError, "another dataset"),
        ({"": dict(status_code=404, headers={"X-Error-Code": "RevisionNotFound"})}, FileNotFoundError, "Revision 'v2'"),
        ({"": dict(status_code=403, headers={"X-Error-Code": "GatedRepo"})}, FileNotFoundError, "gated.*hf auth login"),
        (
            {
                "README.md": dict(status_code=404, headers={"X-Error-Code": "EntryNotFound"}),
                "/revision/": dict(status_code=200, json=dict(id="owner/text", sha=SHA, siblings=[])),
                "text.py": dict(
                    status_code=200,
                    headers={"ETag": '"x"', "X-Repo-Commit": SHA, "Content-Length": "1"},
                    content=b"1",
                ),
            },
            ValueError,
            r"owner/text cannot be read \(RuntimeError: .*scripts are no longer supported",
        ),
    ],
    ids=["no data set", "no revision", "gated", "script"],
)
def test_what_the_hub_refuses_is_one_sentence(tmp_path, monkeypatch, answers, error, sentence):
    FakeHub(monkeypatch, tmp_path / "hub", {}, answers)
    with pytest.raises(error, match=sentence):
        list(Corpus(dataset="owner/text", revision="v2").documents())


def test_offline_is_one_sentence(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError, match="cannot be reached .*Offline.*go online, or copy its files into a folder"
    ):
        list(Corpus(dataset="owner/text").documents())


def test_without_the_library_its_name_is_said(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert list(Corpus(path=str(folder / "lines.jsonl")).documents()) == TEXTS
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        list(Corpus(path=str(folder / "one.parquet")).documents())


def test_a_library_that_cannot_be_imported_is_one_sentence(folder, monkeypatch):
    """As where another version of pyarrow is installed than the one that `datasets` needs."""
    (folder / "datasets.py").write_text("raise AttributeError('pyarrow has no attribute Something')")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "datasets")
    with pytest.raises(ValueError, match=r"one.parquet cannot be read \(AttributeError: pyarrow has no"):
        list(Corpus(path=str(folder / "one.parquet")).documents())


def test_a_profile_names_its_corpus(tmp_path):
    text = (paths.ROOT / "profiles" / "smoke.yaml").read_text()
    assert load_profile("smoke").corpus is None
    for given, corpus in {
        "notes": Corpus(path="notes", root=paths.ROOT),
        "{dataset: Skylion007/openwebtext, revision: refs/convert/parquet}": Corpus(
            dataset="Skylion007/openwebtext", revision="refs/convert/parquet", root=paths.ROOT
        ),
    }.items():
        (tmp_path / "own.yaml").write_text(f"{text}corpus: {given}\n")
        loaded = load_profile("own", tmp_path).corpus
        assert loaded == corpus
        # the root is not part of the fingerprint
        assert loaded.identity() == corpus.model_copy(update=dict(root=tmp_path)).identity()
    for given, sentence in {
        "{path: a, dataset: b}": "either a path or a dataset",
        "{column: text}": "either a path or a dataset",
        "{path: a, revision: b}": "leave them out beside a path",
        "{place: a}": "Profile own: corpus.place",
    }.items():
        (tmp_path / "own.yaml").write_text(f"{text}corpus: {given}\n")
        with pytest.raises(ValueError, match=sentence):
            load_profile("own", tmp_path)


def test_windows_are_cut_again_where_the_text_has_changed(folder, monkeypatch, capsys):
    monkeypatch.setenv("WRITESAE_OUTPUT", str(folder / "out"))
    smoke = load_profile("smoke")
    data = smoke.data.model_copy(update=dict(window=LENGTH, sae_windows=20))
    path = folder / "lines.jsonl"

    def windows(corpus):
        study = Study(smoke.model_copy(update=dict(data=data, corpus=corpus)))
        monkeypatch.setattr(study, "host", lambda name: HOST)
        return study.windows("gated_deltanet", "sae").tokens

    kept = windows(Corpus(path=str(path)))
    stored = Study(smoke)._windows_path("gated_deltanet", "sae")
    assert read_sidecar(stored)["metadata"]["end_of_text"] == Words.eos_token_id
    assert "documents hold 8 tokens" in capsys.readouterr().err
    assert windows(Corpus(path=str(path))).equal(kept) and not capsys.readouterr().err
    path.write_text("\n".join(path.read_text().splitlines()[50:]))
    assert not windows(Corpus(path=str(path))).equal(kept)
    again = windows(Corpus(path=str(folder / "texts")))
    assert again.equal(kept)


def test_the_docstrings_packages_and_the_corpus_are_in_every_fingerprint(folder, monkeypatch):
    smoke = load_profile("smoke")

    def fingerprint(corpus=None):
        return Study(smoke.model_copy(update=dict(corpus=corpus))).host_fingerprint("gated_deltanet")

    before = fingerprint()
    assert fingerprint() == before
    seen = [before, *(fingerprint(corpus) for corpus in corpora(folder).values())]
    seen += [fingerprint(Corpus(dataset="owner/text", revision=revision)) for revision in ("a", "b")]
    monkeypatch.setattr("replication.study.docstrings.versions", lambda: dict(python="3.11", numpy="another"))
    seen.append(fingerprint())
    assert len({str(x) for x in seen}) == len(seen)


# The files of a corpus: patterns, hidden files, links


@pytest.fixture
def odd(tmp_path, monkeypatch):
    """The same twenty documents below folders whose names look like patterns, and the current folder there."""
    folder = tmp_path / "papers [2026] (a*b?)"
    (folder / "notes [x]" / "sub").mkdir(parents=True)
    for n, text in enumerate(TEXTS[:20]):
        (folder / "notes [x]" / ("sub" if n % 2 else "") / f"{n:02d}.txt").write_text(text)
    parquet(folder / "one [1].parquet", TEXTS[:20])
    lines = "".join(json.dumps(dict(text=text)) + "\n" for text in TEXTS[:20])
    (folder / "lines [1].jsonl").write_text(lines)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "path",
    ["notes [x]", "notes [x]/**/*.txt", "notes [x]/**/??.txt", "notes [x]/**/[01][0-9].txt", "lines [1].jsonl"]
    + ["lines*.jsonl", "lines ?1?.jsonl", "one [1].parquet", "*.parquet", "one [[]1].parquet"],
)
@pytest.mark.parametrize("absolute", [True, False])
def test_only_the_part_of_a_path_that_does_not_exist_is_a_pattern(odd, path, absolute):
    corpora = Corpus(path=str(odd / path) if absolute else path), Corpus(path=path, root=odd)
    for corpus in corpora:
        assert sorted(corpus.documents()) == sorted(TEXTS[:20])
        assert corpus.files() and all(file.is_file() for file in corpus.files())


def test_a_corpus_below_the_home_folder_needs_no_full_path(odd, monkeypatch):
    monkeypatch.setenv("HOME", str(odd))
    for path in ("~/notes [x]", "~/notes [x]/**/*.txt", "~/lines [1].jsonl"):
        assert sorted(Corpus(path=path).documents()) == sorted(TEXTS[:20])
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        list(Corpus(path="~nobody-here/notes").documents())


@pytest.mark.parametrize("path", ["nowhere [x]", "lines [1].jsonl/*.txt", "notes [x]/none.txt", "lines [1].jsonl/x"])
def test_what_is_no_pattern_and_does_not_exist_is_missing(odd, path):
    if path == "nowhere [x]":  # a pattern that matches nothing
        with pytest.raises(ValueError, match="is empty: it holds no document, in 0 files"):
            list(Corpus(path=path).documents())
    else:
        with pytest.raises(FileNotFoundError, match="There is no file or folder"):
            list(Corpus(path=path).documents())


def test_a_data_set_below_brackets_is_refused_in_one_sentence(odd):
    parquet(odd / "set [1]" / "train.parquet", TEXTS)
    with pytest.raises(
        ValueError, match=r"datasets reads no folder with any of \*\?\[ in its path: rename .*set \[1\]"
    ):
        list(Corpus(dataset="set [1]").documents())


def test_hidden_files_are_skipped_and_links_are_followed_once(tmp_path):
    folder, elsewhere = tmp_path / "notes", tmp_path / "elsewhere"
    for place in (folder, elsewhere, folder / ".git"):
        place.mkdir()
        (place / "a.txt").write_text(f"text of {place.name}")
    (folder / "._a.txt").write_bytes(b"\x00\x05\x16\x07\xff")  # what macOS adds
    (folder / ".#b.txt").symlink_to("nobody@nowhere.123")  # what Emacs adds
    (folder / "more").symlink_to(elsewhere)
    (folder / "again.txt").symlink_to(folder / "a.txt")
    (folder / "loop").symlink_to(folder)
    for path in (folder, folder / "**" / "*.txt", folder / "**" / "*"):
        corpus = Corpus(path=str(path))
        assert sorted(corpus.documents()) == ["text of elsewhere", "text of notes"], path
    assert [path.name for path in Corpus(dataset=str(folder)).files()] == ["a.txt", "a.txt"]


def test_a_pattern_may_name_hidden_files(tmp_path):
    (tmp_path / ".notes").mkdir()
    (tmp_path / ".notes" / "a.txt").write_text("a note")
    for path in (".notes", ".notes/*.txt", ".no*/*.txt"):
        assert list(Corpus(path=str(tmp_path / path)).documents()) == ["a note"]


# Text that is not what it seems


def test_half_an_emoji_is_the_replacement_character(tmp_path):
    path = tmp_path / "scraped.jsonl"
    path.write_bytes(b'{"text": "cut here \\ud83d"}\n{"text": "whole \\ud83d\\ude00"}\n{"text": "\\udc00 first"}\n')
    assert list(Corpus(path=str(path)).documents()) == ["cut here \ufffd", "whole \U0001f600", "\ufffd first"]
    assert len([*Corpus(path=str(path)).texts("sae"), *Corpus(path=str(path)).texts("heldout")]) == 3
    assert as_text("plain \ufffd and \U0001f600", "here") == "plain \ufffd and \U0001f600"
    tokenizer = tokenizers()["byte-level"]
    assert token_ids(tokenizer, "a\ud83db") == token_ids(tokenizer, "a\ufffdb")
    for wrong in (7, b"bytes", ["a list"]):
        with pytest.raises(ValueError, match="the text is a .*, not a string"):
            token_ids(tokenizer, wrong)


def tokenizers() -> dict:
    """One tokenizer of each kind that hosts have."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import AddedToken, PreTrainedTokenizerFast

    from replication.study import docstrings

    text = ["some words </s> and <|endoftext|> more <|im_end|> words"] * 3
    trained = docstrings.train_tokenizer(text, 300)
    byte_level = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token=docstrings.END_OF_TEXT)
    blanks = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))  # as converted from sentencepiece
    blanks.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    blanks.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    blanks.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=blanks, eos_token="</s>", unk_token="<unk>")
    chat = PreTrainedTokenizerFast(tokenizer_object=docstrings.train_tokenizer(text, 300), pad_token="<|endoftext|>")
    chat.add_special_tokens(dict(eos_token=AddedToken("<|im_end|>", special=True)))
    return {"byte-level": byte_level, "sentencepiece": sentencepiece, "chat": chat}


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "chat"])
def test_what_spells_a_control_token_in_a_text_is_text(kind):
    tokenizer = tokenizers()[kind]
    text = "words </s> and <|endoftext|> more <|im_end|> some <s> words "
    ids = token_ids(tokenizer, text)
    assert not set(ids) & {*tokenizer.all_special_ids, end_of_text(tokenizer)}
    assert tokenizer.decode(ids).strip() == text.strip()
    windows = cut_windows(tokenizer, [text * 5, text * 3], 16)
    begins = windows.tokens[:, 0] == end_of_text(tokenizer)
    assert (windows.tokens == end_of_text(tokenizer)).sum() == begins.sum() == 2
    assert tokenizer("</s>", add_special_tokens=False)["input_ids"]  # and it still parses them for others
    plain = "some words and more words"
    assert token_ids(tokenizer, plain) == tokenizer(plain, add_special_tokens=False)["input_ids"]


def test_the_world_tokenizer_knows_no_control_tokens(tmp_path):
    path = tmp_path / "rwkv_vocab_v1.txt"
    path.write_text("".join(f"{i + 1} {bytes([i])!r} 1\n" for i in range(256)))
    tokenizer = WorldTokenizer(path)
    ids = token_ids(tokenizer, "a<|endoftext|>b\ud83d")
    assert end_of_text(tokenizer) == 0 not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b\ufffd"


@pytest.mark.parametrize(
    ("own", "others", "wanted"),
    [
        ("<|endoftext|>", ["<|im_end|>", "</s>"], "<|endoftext|>"),
        ("</s>", ["<|endoftext|>"], "</s>"),
        ("<|im_end|>", ["<|endoftext|>"], "<|endoftext|>"),
        ("<|eot_id|>", ["<|begin_of_text|>", "<|end_of_text|>"], "<|end_of_text|>"),
        ("<end_of_turn>", ["<eos>"], "<eos>"),
        ("<|im_end|>", ["</s>", "<|im_start|>"], "</s>"),
        ("<document>", ["<|im_end|>"], "<document>"),
        (None, ["<|endoftext|>"], "<|endoftext|>"),
    ],
)
def test_documents_are_separated_by_end_of_text_and_not_by_the_end_of_a_turn(own, others, wanted):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["some", *others, *([own] if own else [])])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), eos_token=own)
    tokenizer.add_special_tokens(dict(additional_special_tokens=others))
    assert end_of_text(tokenizer) == words[wanted]
    assert tokenizer.eos_token == own  # the tokenizer itself is not changed
    assert len(set(SEPARATORS)) == len(SEPARATORS)


def test_a_tokenizer_without_any_separator_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(dict(some=0))))
    with pytest.raises(ValueError, match="no end-of-text token to begin windows with: set its eos_token"):
        end_of_text(tokenizer)


@pytest.mark.parametrize("count", [1, 6])
def test_a_split_without_documents_is_named(tmp_path, count):
    """One book, or six notes whose hashes are all on one side."""
    texts = [text for text in TEXTS if text not in [*Corpus(path=write(tmp_path, TEXTS)).texts("heldout")]][:count]
    corpus = Corpus(path=write(tmp_path, texts))
    assert sorted(corpus.texts("sae")) == sorted(texts)
    with pytest.raises(
        ValueError, match=rf"has {count} documents, and none of them is in the split heldout: whole doc"
    ):
        cut_windows(Words(), corpus.texts("heldout"), LENGTH)


def write(folder, texts) -> str:
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
    return str(path)


def test_too_few_windows_are_told_from_no_text():
    texts = ["1.1 1.2 1.3 1.4 1.5 1.6 1.7 1.8 1.9", "2.1", "3.1 3.2"]
    with pytest.raises(
        ValueError, match="3 passages give 1 windows of 8 tokens .* and 2 passages are shorter than a win"
    ):
        cut_windows(Words(), texts, 8, limit=2)
    with pytest.raises(ValueError, match="0 passages give 0 windows of 8 tokens .*: give some text"):
        cut_windows(Words(), [], 8)
