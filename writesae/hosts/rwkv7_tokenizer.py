"""The tokenizer of the RWKV "World" models, read from their vocabulary file, rwkv_vocab_v20230424.txt.

Each line of the file has an id, a Python literal (str or bytes) and the number of its bytes. Id 0, which is
not in the file, is end-of-text. The Python code in the models' repositories is not run.
"""

from __future__ import annotations

import ast
from pathlib import Path

from writesae.files import local_path, reading

VOCABULARY = "rwkv_vocab*.txt"


class WorldTokenizer:
    """A tokenizer that takes the longest matching token. Raises ValueError for a file of another form."""

    eos_token_id = 0

    def __init__(self, path: str | Path):
        self.tokens: dict[int, bytes] = {}
        with reading(f"The RWKV vocabulary {path}"):
            lines = local_path(path).read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            with reading(f"Line {number} of {path}", "an RWKV vocabulary has an id, a token and its number of bytes"):
                token_id, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                token = ast.literal_eval(literal)
                token = token.encode() if isinstance(token, str) else bytes(token)
                if len(token) != int(length) or not token:
                    raise ValueError(f"{len(token)} bytes")
                self.tokens[int(token_id)] = token
        self.ids = {token: i for i, token in self.tokens.items()}
        missing = [byte for byte in range(256) if bytes([byte]) not in self.ids]
        if missing:
            raise ValueError(f"{path} is no RWKV vocabulary: it has no token for the byte {missing[0]:#04x}.")
        self._longest: dict[bytes, int] = {}  # two bytes -> the longest token that begins with them
        for token in self.ids:
            self._longest[token[:2]] = max(self._longest.get(token[:2], 1), len(token))

    def get_vocab(self) -> dict[bytes, int]:
        return {b"": self.eos_token_id} | self.ids

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without end-of-text."""
        data, place, ids = text.encode(), 0, []
        while place < len(data):
            for length in range(self._longest.get(data[place : place + 2], 1), 0, -1):
                token = data[place : place + length]
                if token in self.ids:
                    break
            ids.append(self.ids[token])
            place += len(token)
        return ids

    def __call__(self, text: str, **options) -> dict[str, list[int]]:
        """Return {"input_ids": ids}, as the tokenizers of transformers do; options have no effect."""
        return {"input_ids": self.encode(text)}

    def decode(self, ids, **options) -> str:
        """Return the text of ids; unknown ids are skipped, and invalid UTF-8 is replaced."""
        return b"".join(self.tokens.get(int(i), b"") for i in ids).decode(errors="replace")
