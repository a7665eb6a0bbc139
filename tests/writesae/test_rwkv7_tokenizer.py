"""The RWKV World tokenizer against a search over all tokens, its file, and a host that uses it."""

import random

import pytest
import torch
from conftest import SMALL

from writesae.hosts.load import adapter, load_host
from writesae.hosts.rwkv7_tokenizer import WorldTokenizer

WORDS = [" the", "the", "th", " a", "naïve", "é", "\n\n", "'quoted'", "∑x", "ab", "abc", "abcdef"]


def lines():
    tokens = [bytes([b]) for b in range(256)] + [w.encode() for w in WORDS] + ["∑".encode()[:2], b"\xff\xfe"]
    for i, token in enumerate(tokens, 1):
        try:
            yield f"{i} {token.decode()!r} {len(token)}"
        except UnicodeDecodeError:
            yield f"{i} {token!r} {len(token)}"


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "rwkv_vocab_v20230424.txt"
    path.write_text("\n".join(lines()) + "\n", encoding="utf-8")
    return path


def test_the_longest_token_at_every_place(vocabulary):
    tokenizer = WorldTokenizer(vocabulary)
    draw = random.Random(0)
    pieces = [*WORDS, "b", "c", "de", " ", "ü", "∑", "x"]
    for _ in range(50):
        text = "".join(draw.choices(pieces, k=30))
        found, data = [], text.encode()
        while data:
            i, token = max(((i, t) for i, t in tokenizer.tokens.items() if data.startswith(t)), key=lambda x: len(x[1]))
            found.append(i)
            data = data[len(token) :]
        assert tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] == found
        assert tokenizer.decode(found, clean_up_tokenization_spaces=False) == text
    assert tokenizer.decode([0, 1 + ord("a"), 99999]) == "a"
    assert max(tokenizer.get_vocab().values()) == 256 + len(WORDS) + 2


def test_a_damaged_vocabulary_is_one_sentence(vocabulary):
    text = vocabulary.read_text(encoding="utf-8")
    for broken, says in (
        (text.replace("'abc' 3", "'abc' 4"), r"Line \d+ of .*\(ValueError: 3 bytes\): an RWKV vocabulary has an id, a"),
        (text.replace("'abc' 3", "__import__('os') 3"), r"Line \d+ of .* cannot be read"),
        (text.replace("'abc' 3", "(" * 300 + " 3"), r"Line \d+ of .* cannot be read"),
        (text.replace("98 'a' 1\n", ""), "it has no token for the byte 0x61"),
        ("{}\n", "Line 1 of .* cannot be read"),
    ):
        vocabulary.write_text(broken, encoding="utf-8")
        with pytest.raises(ValueError, match=says):
            WorldTokenizer(vocabulary)


def test_a_host_whose_folder_has_the_vocabulary_alone(vocabulary):
    torch.manual_seed(0)
    adapter("rwkv7").build(SMALL["rwkv7"]).save_pretrained(vocabulary.parent)
    host = load_host(vocabulary.parent)
    assert host.tokenizer.decode(host.tokenizer("the ∑")["input_ids"]) == "the ∑"
