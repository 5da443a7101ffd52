"""Texts to token ids as the tokenizer gives them, but long texts in parallel and only once.

A long text is cut where its content says so, and each piece is encoded with some text around it.
Texts that share most of their characters thus share most of their pieces, which are remembered for
everyone in the process who has the same tokenizer: for a task that sizes prompts as for a backend.
"""

from __future__ import annotations

import hashlib
import os
import re
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import NamedTuple
from zlib import crc32

import numpy as np
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

# Characters of a piece, but for the last one of a text, which may be shorter.
_SHORTEST, _LONGEST = 1 << 14, 1 << 15
# A cut is the first end of a word whose preceding characters' hash is a multiple of `_RARITY`: so
# rare that a sentence put into a text seldom moves the cuts behind it.
_WORD_END = re.compile(r"(?<=\w)(?![\w'’])")
_HASHED, _RARITY = 32, 64
_AROUND = 256  # characters on each side that a piece is encoded with
_AGREEING = 8  # tokens on each side of a cut that both its pieces must agree on
_BATCH = 1 << 16  # characters that a thread encodes at a time
_REMEMBERED = 1 << 26  # characters


@dataclass(frozen=True)
class _Piece:
    """A piece of a text, encoded.

    Attributes:
        ids: int32 [n].
        ends: the position in the piece of the character after each token, int32 [n]; None if
            nobody asked.
        left, right: the tokens around the cut before and after it, and which of them begin a word;
            None where a piece may not begin, or where too few are known to tell.
    """

    ids: np.ndarray
    ends: np.ndarray | None
    left: tuple[int, ...] | None
    right: tuple[int, ...] | None


class _Cutout(NamedTuple):
    """The characters to encode for a piece: between `begin` and `end`, the piece's own."""

    tokenizer: tuple[str, bool]
    text: str
    begin: int
    end: int


class _Memory:
    """Pieces by what they are made of, the last used ones, up to some characters in all."""

    def __init__(self, characters: int) -> None:
        self._room = characters
        self._pieces: OrderedDict[_Cutout, _Piece] = OrderedDict()

    def get(self, cutout: _Cutout) -> _Piece | None:
        piece = self._pieces.get(cutout)
        if piece is not None:
            self._pieces.move_to_end(cutout)
        return piece

    def put(self, cutout: _Cutout, piece: _Piece) -> None:
        if self._pieces.pop(cutout, None) is None:
            self._room -= len(cutout.text)
        self._pieces[cutout] = piece
        while self._room < 0:
            dropped, _ = self._pieces.popitem(last=False)
            self._room += len(dropped.text)


_memory = _Memory(_REMEMBERED)


class Encoder:
    """Encodes texts with a fast tokenizer, no special tokens added.

    Ids and positions equal those of the tokenizer's own call on the whole text.

    Attributes:
        fingerprint: a hash of all that its `tokenizer.json` says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        backend = self._backend()
        self.fingerprint = hashlib.sha256(backend.to_str().encode()).hexdigest()
        # Words are encoded by themselves, so that a piece may end where one does. In byte-pair
        # encoding it may end within a word, too, say where a whole text is one: there a row of
        # tokens is right if every two neighbours would be in a text of their own.
        self._whole_words = not isinstance(backend.model, BPE)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: int32 [n]."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text: int32 [n]. What is new in any of them is encoded in parallel."""
        encoded = self._encode(texts, ends=False)
        return [np.concatenate([piece.ids for piece in pieces]) for _, pieces in encoded]

    def ends(self, text: str) -> np.ndarray:
        """For each token of a text, the position of the character after it: int64, ascending."""
        [(cuts, pieces)] = self._encode([text], ends=True)
        ends = []
        for cut, piece in zip(cuts, pieces, strict=False):
            assert piece.ends is not None
            ends.append(cut + piece.ends.astype(np.int64))
        return np.maximum.accumulate(np.concatenate(ends))

    def _encode(self, texts: Sequence[str], ends: bool) -> list[tuple[list[int], list[_Piece]]]:
        """For each text, where its pieces begin (and, last, its end), and the pieces."""
        encoded: list = [None] * len(texts)
        cuts = {i: _cuts(text) for i, text in enumerate(texts)}
        while cuts:
            cutouts = {
                i: [self._cutout(texts[i], begin, end) for begin, end in pairwise(own)]
                for i, own in cuts.items()
            }
            found = self._pieces(dict.fromkeys(chain.from_iterable(cutouts.values())), ends)
            for i, own in cutouts.items():
                pieces = [found[cutout] for cutout in own]
                apart = [
                    cut
                    for cut, (a, b) in zip(cuts[i][1:], pairwise(pieces), strict=False)
                    if a.right is None or a.right != b.left
                ]
                if apart:  # these cuts were no good
                    cuts[i] = [cut for cut in cuts[i] if cut not in apart]
                else:
                    encoded[i] = cuts.pop(i), pieces
        return encoded

    def _cutout(self, text: str, begin: int, end: int) -> _Cutout:
        first = max(0, begin - _AROUND)
        around = text[first : end + _AROUND]
        # Special tokens in a text are found or not, by an attribute that may change.
        key = self.fingerprint, bool(self._tokenizer.split_special_tokens)
        return _Cutout(key, around, begin - first, end - first)

    def _pieces(self, cutouts: Iterable[_Cutout], ends: bool) -> dict[_Cutout, _Piece]:
        """The pieces, from memory where they are there."""
        found, new = {}, []
        for cutout in cutouts:
            piece = _memory.get(cutout)
            if piece is None or (ends and piece.ends is None):
                new.append(cutout)
            else:
                found[cutout] = piece
        backend = self._backend()

        def encode(batch: Sequence[_Cutout]) -> list[_Piece]:
            # The faster call gives no positions, which tell where a piece ends in its text.
            whole = all(c.begin == 0 and c.end == len(c.text) for c in batch) and not ends
            encode_all = backend.encode_batch_fast if whole else backend.encode_batch
            encodings = encode_all([c.text for c in batch], add_special_tokens=False)
            return [self._piece(c, e, ends) for c, e in zip(batch, encodings, strict=True)]

        # Threads of our own: lm-eval switches the library's off, which lets Python run meanwhile.
        batches = list(_batches(new))
        with ThreadPoolExecutor(_threads()) as pool:
            encoded = pool.map(encode, batches) if len(batches) > 1 else map(encode, batches)
            for batch, pieces in zip(batches, encoded, strict=True):
                for cutout, piece in zip(batch, pieces, strict=True):
                    found[cutout] = piece
                    _memory.put(cutout, piece)
        return found

    def _backend(self) -> Tokenizer:
        """The tokenizer without what its own call makes of encodings: lists and dictionaries."""
        # A call of its own sets it to neither pad nor truncate, and whether special tokens in a
        # text are found.
        self._tokenizer("", add_special_tokens=False)
        return self._tokenizer.backend_tokenizer

    def _piece(self, cutout: _Cutout, encoding: Encoding, ends: bool) -> _Piece:
        ids = np.array(encoding.ids, dtype=np.int32)
        first, left = self._edge(encoding, ids, cutout.begin)
        last, right = len(ids), None
        if cutout.end < len(cutout.text):
            last, right = self._edge(encoding, ids, cutout.end)
        positions = None
        if ends:
            own = encoding.offsets[first:last]
            positions = np.fromiter((end for _, end in own), np.int32, len(own)) - cutout.begin
        return _Piece(ids[first:last].copy(), positions, left, right)

    def _edge(
        self, encoding: Encoding, ids: np.ndarray, cut: int
    ) -> tuple[int, tuple[int, ...] | None]:
        """The first token that begins at the cut or behind, and the tokens around if all is well.

        No token may have characters on both sides, and there must be enough on each.
        """
        if cut == 0:
            return 0, None
        index = bisect_left(range(len(ids)), cut, key=lambda i: _chars(encoding, i)[0])
        if not _AGREEING <= index <= len(ids) - _AGREEING:
            return index, None
        if _chars(encoding, index - 1)[1] > cut:
            return index, None
        around = range(index - _AGREEING, index + _AGREEING)
        words = [encoding.token_to_word(i) for i in around]
        new = tuple(a != b for a, b in pairwise(words))
        if self._whole_words and not new[_AGREEING - 1]:
            return index, None
        return index, (*ids[around.start : around.stop].tolist(), *new)


def _threads() -> int:
    """This process's cores, or its part of them where torchrun has started others beside it."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux has it
    cores = len(allowed(0)) if allowed else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _chars(encoding: Encoding, token: int) -> tuple[int, int]:
    """The characters, first and end, that a token of a text stands for."""
    found = encoding.token_to_chars(token)
    assert found is not None  # only special tokens that were added stand for none
    return found


def _batches(cutouts: Iterable[_Cutout]) -> Iterator[list[_Cutout]]:
    batch: list[_Cutout] = []
    size = 0
    for cutout in cutouts:
        if batch and size + len(cutout.text) > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(cutout)
        size += len(cutout.text)
    if batch:
        yield batch


def _cuts(text: str) -> list[int]:
    """Where the pieces of a text begin and, last, its end."""
    cuts = [0]
    while len(text) - cuts[-1] > _LONGEST:
        furthest = cuts[-1] + _LONGEST
        words = _WORD_END.finditer(text, cuts[-1] + _SHORTEST, furthest)
        cuts.append(next((at for word in words if _marked(text, at := word.start())), furthest))
    return [*cuts, len(text)]


def _marked(text: str, position: int) -> bool:
    before = text[position - _HASHED : position]
    return crc32(before.encode("utf-8", "surrogatepass")) % _RARITY == 0
