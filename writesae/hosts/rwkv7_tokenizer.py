"""The tokenizer of the RWKV "World" models, read from their vocabulary file, rwkv_vocab_v20230424.txt.

At every place the longest token that the text goes on with, over UTF-8 bytes. The models' repositories bring
it as Python code of their own, which is not run here; the file has all that it takes: on every line an id, a
Python literal (str or bytes), and the number of its bytes. Id 0, which the file leaves out, ends a text.
"""

from __future__ import annotations

import ast
from pathlib import Path

VOCABULARY = "rwkv_vocab*.txt"


class WorldTokenizer:
    """What hosts need of a tokenizer. Raises ValueError for a file that is not such a vocabulary."""

    eos_token_id = 0

    def __init__(self, path: str | Path):
        self.tokens: dict[int, bytes] = {}
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                name, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else bytes(token)
                if len(token) != int(length) or not token:
                    raise ValueError(f"{len(token)} bytes")
                self.tokens[int(name)] = token
            except (ValueError, SyntaxError, TypeError) as error:
                raise ValueError(
                    f"{path} is no RWKV vocabulary: line {number} is not an id, a token and its number of bytes ({error})."
                ) from None
        self.ids = {token: i for i, token in self.tokens.items()}
        lacking = [b for b in range(256) if bytes([b]) not in self.ids]
        if lacking:
            raise ValueError(f"{path} is no RWKV vocabulary: it has no token for the byte {lacking[0]:#04x}.")
        self._longest: dict[bytes, int] = {}  # of the tokens that begin with these two bytes
        for token in self.ids:
            self._longest[token[:2]] = max(self._longest.get(token[:2], 1), len(token))

    def get_vocab(self) -> dict[bytes, int]:
        return {b"": self.eos_token_id} | self.ids

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end."""
        data, place, found = text.encode(), 0, []
        while place < len(data):
            for length in range(self._longest.get(data[place : place + 2], 1), 0, -1):
                token = data[place : place + length]
                if token in self.ids:
                    break
            found.append(self.ids[token])
            place += len(token)
        return found

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        """As transformers' tokenizers are called; there are no special tokens to add."""
        return {"input_ids": self.encode(text)}

    def decode(self, ids, **options) -> str:
        """The text of ids; bytes that are no UTF-8 show as replacement characters, ids of no token not at
        all."""
        return b"".join(self.tokens.get(int(i), b"") for i in ids).decode(errors="replace")
