"""Training documents packed into windows of token ids, weights and document numbers, as NumPy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
from tokenizers import Tokenizer

# Documents go into the shortest window that holds them: attention costs less there.
LENGTHS = (128, 384, 1024)
# How many windows of a length a training step takes, and every how many steps: about 4,000 tokens, in the shares that
# the corpus has.
A_STEP = {128: (24, 1), 384: (3, 1), 1024: (1, 8)}
# What a token counts in the loss: the assistant's words and plain text fully, what others say a little.
OWN, OTHERS = 20, 2
NONE = 255  # the document number of padding


@dataclass(frozen=True)
class Windows:
    """All windows of one length."""

    token: np.ndarray  # [N, T] uint16
    weight: np.ndarray  # [N, T] uint8; of the token as a target, 0 for the first of a document and for padding
    document: np.ndarray  # [N, T] uint8; number within the window


def weights(ids: np.ndarray, im_start: int, im_end: int, assistant: int) -> np.ndarray:
    """The loss weight of every token of one document."""
    turns = np.cumsum(ids == im_start)
    if turns[-1] == 0:
        weight = np.full(len(ids), OWN, np.uint8)
    else:
        starts = np.flatnonzero(ids == im_start)
        spoken = np.concatenate(([False], ids[starts + 1] == assistant))[turns]
        inside = (
            np.arange(len(ids)) - np.concatenate(([0], starts))[turns] >= 3
        )  # after <|im_start|>, role and line end
        ended = np.cumsum(ids == im_end)
        open_turn = (turns > ended) | (ids == im_end)
        weight = np.where(spoken & inside & open_turn, OWN, OTHERS).astype(np.uint8)
    weight[0] = 0
    return weight


def encoded(tokenizer: Tokenizer, seed: int) -> Iterator[np.ndarray]:
    """Token ids of training documents without end, one array each."""
    stream = corpus.documents(seed)
    while True:
        for encoding in tokenizer.encode_batch_fast(list(itertools.islice(stream, 4096))):
            if len(encoding.ids) <= LENGTHS[-1]:
                yield np.array(encoding.ids, np.uint16)


@dataclass
class Shelf:
    """Windows of one length being filled: a document goes into the fullest open one that has room for it."""

    length: int
    open_windows: list[list[np.ndarray]]
    room: np.ndarray
    done: list[list[np.ndarray]]

    def put(self, ids: np.ndarray) -> None:
        """Adds a document; where none of the open windows has room, the fullest is done."""
        fits = np.where(self.room >= len(ids), self.room, self.length + 1)
        at = int(fits.argmin())
        if fits[at] > self.length:
            at = int(self.room.argmin())
            self.done.append(self.open_windows[at])
            self.open_windows[at], self.room[at] = [], self.length
        self.open_windows[at].append(ids)
        self.room[at] -= len(ids)


def shelf(length: int) -> Shelf:
    """An empty shelf; about 32,000 tokens are open at once."""
    count = 32_768 // length
    return Shelf(length, [[] for _ in range(count)], np.full(count, length), [])


def pack(tokenizer: Tokenizer, seed: int, steps: int) -> dict[int, Windows]:
    """Windows of each length for so many steps; those of fewer steps are the first of them."""
    im_start, im_end, assistant = (tokenizer.token_to_id(t) for t in (corpus.IM_START, corpus.IM_END, "assistant"))
    needed = {length: steps * count // every for length, (count, every) in A_STEP.items()}
    shelves = {length: shelf(length) for length in LENGTHS}
    for ids in encoded(tokenizer, seed):
        shelves[next(n for n in LENGTHS if len(ids) <= n)].put(ids)
        if all(len(s.done) >= needed[n] for n, s in shelves.items()):
            break
    packed = {}
    for length, count in needed.items():
        windows = shelves[length].done[:count]
        token, weight, document = (np.zeros((len(windows), length), kind) for kind in (np.uint16, np.uint8, np.uint8))
        document[:] = NONE
        for n, window in enumerate(windows):
            at = 0
            for k, ids in enumerate(window):
                token[n, at : at + len(ids)] = ids
                weight[n, at : at + len(ids)] = weights(ids, im_start, im_end, assistant)
                document[n, at : at + len(ids)] = k
                at += len(ids)
        packed[length] = Windows(token, weight, document)
    return packed


def save(packed: dict[int, Windows], path: Path) -> None:
    """Writes the windows to one .npz file."""
    arrays = {
        f"{name}{length}": getattr(w, name) for length, w in packed.items() for name in ("token", "weight", "document")
    }
    np.savez(path, **arrays)


def load(path: Path) -> dict[int, Windows]:
    """The windows in an .npz file that `save` wrote."""
    with np.load(path) as file:
        return {
            length: Windows(*(file[f"{name}{length}"] for name in ("token", "weight", "document")))
            for length in LENGTHS
        }
