"""Is the tokenizer that transformers made of a GGUF file the one the file describes?

Releases differ, and a wrong one fails in silence: of the same Gemma file transformers 5.17 makes a tokenizer that cuts words
into letters, 5.18 to 5.22 one that leaves out the begin mark, 5.23 the right one.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BOOL, STRING = 7, 8
WORD_MARKS = ("\u2581", "\u0120")
SAMPLE, LEAST = 64, 16


def tokenizer_fault(path: Path, tokenizer: Any) -> str | None:
    """What the tokenizer does otherwise than its file says; None where nothing was found.

    Two things are looked at: the begin mark (llama.cpp's rule: what ``add_bos_token`` says, else yes for SentencePiece
    files), and whether words that the vocabulary has whole come out whole.
    """
    kind, said = metadata(path, "tokenizer.ggml.model"), metadata(path, "tokenizer.ggml.add_bos_token")
    begin = tokenizer.bos_token_id
    if begin is not None and (said is not None or kind is not None):
        wanted = bool(said) if said is not None else kind == "llama"
        ids = tokenizer("a")["input_ids"]
        if wanted != (ids[:1] == [begin]):
            does = "leaves out" if wanted else "adds"
            return f"it {does} the begin mark {tokenizer.bos_token!r}, against what the file says"
    words = whole_words(tokenizer.get_vocab())
    cut = [word for word in words if tokenizer.tokenize(f"a {word[1:]}")[-1:] != [word]]
    if len(words) >= LEAST and len(cut) > len(words) // 2:
        return f"it cuts {len(cut)} of {len(words)} words that its vocabulary has whole, such as {cut[0][1:]!r}"
    return None


def whole_words(vocabulary: Mapping[str, int]) -> list[str]:
    """The first entries of the vocabulary that are a space and an English word: the commonest come first in most files."""
    found = sorted(vocabulary, key=vocabulary.__getitem__)
    words = (t for t in found if t[:1] in WORD_MARKS and len(t) > 3 and t[1:].isascii() and t[1:].isalpha())
    return [word for word, _ in zip(words, range(SAMPLE), strict=False)]


def metadata(path: Path, key: str) -> str | bool | None:
    """A text or yes-no entry of a GGUF file's header; None where there is none.

    The library's own reader goes through every entry, 15 s for a vocabulary of 262k tokens; this one looks for the key.
    """
    sought = struct.pack("<Q", len(key)) + key.encode()
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(sought)
        if at < 0:
            return None
        at += len(sought)
        (kind,) = struct.unpack_from("<I", data, at)
        if kind == BOOL:
            return data[at + 4] != 0
        if kind == STRING:
            (length,) = struct.unpack_from("<Q", data, at + 4)
            return data[at + 12 : at + 12 + length].decode("utf-8", "replace")
    return None
