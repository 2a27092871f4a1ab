"""The functional API: sequences as values and one verb, `extend`.

    model = fn.load("demo")
    rt = fn.Runtime(model)
    seq, logits = rt.extend(rt.empty, model.encode("Once upon a time"))
    token = fn.sample(logits, temperature=0.8, seed=7, position=len(seq))
    seq, logits = rt.extend(seq, [token])

A `Sequence` is immutable. Use it twice to fork it, slice it to roll it back, let it go to free it. It owns blocks of
KV, never a row: a row is the device's cache of a sequence, found again when the same value is extended.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path as FilePath
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fnengine import kept, keys
from fnengine.build import Built, build
from fnengine.errors import ContextLengthError, KeptError, OutOfBlocks, RequestError
from fnengine.host.ask import pipeline_of
from fnengine.host.blocks import Extension, Ledger, Path, Salt
from fnengine.host.request import PLAIN, Sampling, check_sampling, fold_in
from fnengine.host.states import NOWHERE, States, states_of
from fnengine.host.steer import Steering, digest_of, salted, steerings
from fnengine.host.step import BLOCK, Admission, Ask, StepInput
from fnengine.host.windows import BACK, windows_of
from fnengine.model import Model
from fnengine.processors import Own
from fnengine.sequence import CLOSED, Likeliest, Logits, Sequence, Tokens, as_arrays, wishes
from fnengine.settings import Settings
from fnengine.spec import tap_names
from fnengine.state import Pool

ALL_LOGITS_BYTES = 1 << 30
"""Most bytes of float32 logits that `logits="all"` may ask for in one call."""


@dataclass
class _Part:
    """One pair of a batched extend on its way."""

    base: Path
    """What is already computed: the given sequence, or what the prefix cache holds of it."""
    seq: Sequence
    tokens: np.ndarray
    """Tokens still to compute."""
    buffer: Tokens
    extension: Extension
    row: int
    sampling: Sampling | None
    seed: int
    prompt_len: int
    pure: int
    steer: Steering | None
    done: int = 0
    admitted: bool = False
    """The row holds it already."""
    state: int = NOWHERE
    """The place of the state that a row which does not begins from."""
    again: int = 0
    """Of the tokens those that the sequence has already: their state is lost, so they are computed once more."""
    entered: bool = False
    """The row has been given what it begins with."""
    holds: tuple[Salt, Sampling | None, int] = ("", None, 0)
    """The steering, sampling and seed that the row has, also when nothing is drawn now."""


class Runtime:
    """The pool, the ledger and the step of one model, driven by `extend`. Not safe to call from two threads at once.

    Args:
        model: from `fnengine.load`.
        settings: sizes; keyword arguments of `Settings` may be given instead.
        processors: name -> function of logits that `Sampling(processors=...)` may ask for.

    Example:
        >>> rt = Runtime(model, kv_cache_memory_bytes=1 << 20)
        >>> seq, logits = rt.extend(rt.empty, [1, 2, 3])
    """

    def __init__(
        self,
        model: Model,
        settings: Settings | None = None,
        *,
        processors: Mapping[str, Own] | None = None,
        **options: Any,
    ):
        settings = settings or Settings(**options)
        built = build(model, settings, processors=processors)
        books: dict[str, Any] = dict(states=states_of(built.device), windows=windows_of(built.device))
        ledger = Ledger(built.device.blocks, BLOCK, caching=settings.enable_prefix_caching, **books)
        self._begin(model, settings, built, ledger)

    @classmethod
    def over(
        cls,
        model: Model,
        settings: Settings,
        built: Built,
        ledger: Ledger,
        books: contextlib.AbstractContextManager[Any] | None = None,
    ) -> Runtime:
        """One over a device and a ledger that an engine has, for the time in which that is at rest.

        After the engine has run, `forget_rows` has to be called: its rows are not what they were.

        Args:
            books: held while a value is cut, where the ledger has another thread.
        """
        here = cls.__new__(cls)
        here._begin(model, settings, built, ledger)
        here._books = books or here._books
        return here

    def _begin(self, model: Model, settings: Settings, built: Built, ledger: Ledger) -> None:
        self.model, self.settings, self.built = model, settings, built
        self._device = built.device
        self._ledger = ledger
        self._dropped: deque[Path] = deque()
        self._books: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        # Row -> (stamp, length, salt of the steering, sampling, seed) of what it holds.
        self._rows: OrderedDict[int, tuple[int, int, Salt, Sampling | None, int] | None] = OrderedDict()
        self._holders: dict[int, weakref.ref[Sequence]] = {}
        """Row -> the sequence whose state it holds, where layers have states."""
        self._lows: dict[int, int] = {}
        """Row -> the first column whose window block it knows, where layers have such."""
        self._stamps = itertools.count()
        self.forget_rows()
        self._unseeded = 0

    def forget_rows(self) -> None:
        """Takes no row for the cache of a sequence any more. What sequences own, blocks, is not touched."""
        self._rows = OrderedDict((r, None) for r in range(self._device.rows))
        self._holders = {}

    @property
    def empty(self) -> Sequence:
        """The sequence of no tokens."""
        return self.nothing()

    def nothing(self, salt: str = "") -> Sequence:
        """The sequence of no tokens, whose continuations share cached blocks only within one salt."""
        return Sequence(self, self._ledger.empty(salt), Tokens(np.empty(0, np.int32), 0), 0, 0)

    @property
    def max_len(self) -> int:
        """Longest sequence, in tokens."""
        return self._device.max_len

    @property
    def rows(self) -> int:
        """Most pairs that one step computes."""
        return self._device.rows

    def new_seed(self) -> int:
        """The next seed for who brings none: 64 bits, from the settings' root seed."""
        self._unseeded += 1
        return fold_in(self.settings.seed, self._unseeded)

    @property
    def free_blocks(self) -> int:
        """Blocks that could be had now, cached ones included."""
        self.drain()
        return self._ledger.available

    def extend(
        self,
        seq: Sequence | Iterable[tuple[Sequence, Iterable[int]]],
        tokens: Iterable[int] | None = None,
        *,
        logits: Logits | Literal["default"] = "default",
        sample: Sampling | list[Sampling] | None = None,
        taps: Iterable[str] = (),
        steer: Mapping[str, Any] | list[Mapping[str, Any] | None] | None = None,
        likeliest: int = 0,
    ) -> Any:
        """The sequence(s) with `tokens` computed, and what comes after them.

        `extend(seq, tokens)` is one pair, `extend([(seq, tokens), ...])` a ragged batch, all or nothing; the same value
        may appear twice. Each result is `(seq, logits)`: `logits="last"` gives [V], `"all"` [n, V] (one row per new
        token), `None` none; float32 on the device, unprocessed. With `sample` each result is `(seq, token)`, the token
        drawn inside the step for position `len(seq)`; with both, `(seq, token, logits)`. Tokens computed by the first
        extend of `empty` are the prompt, later ones count as generated for penalties.

        With `likeliest=k` each result has a `Likeliest` behind the token and the logits: the k likeliest next tokens
        and their log-probabilities, as arrays of the host's, and no logits unless they are asked for by name. It is
        found inside the step, so [V] numbers never leave it.

        With `taps`, names of `spec.tap_names`, each result ends with a dict, name -> [n, D]: the model's inside at each
        new token, on the device, in the model's dtype. `(seq, taps)` with `logits=None`. As with `logits="all"`,
        every token is computed, whatever the prefix cache holds.

        `steer`, layer -> vector (or a list with one such mapping, or None, for each pair), adds the vector to the
        residual stream after that layer at each new token, before a tap there; `Settings.steer` says which layers may
        be. It is part of the call, not of the sequence: give it again with every token that is to be steered. What the
        prefix cache holds of one steering is found under the same one only. In models with recurrent layers it is the
        same from a sequence's first token on: tokens whose state is lost are computed again.

        Raises:
            RequestError: no tokens, a token outside the vocabulary, a closed or foreign sequence, an unknown tap, a
                layer that is not steered or a vector that is none of its; another steering than a sequence of recurrent
                layers was computed under.
            ContextLengthError: a sequence would exceed `max_len`.
            OutOfBlocks: the pool is exhausted; nothing was changed.
        """
        single = tokens is not None
        pairs = [(seq, tokens)] if single else list(seq)  # type: ignore[arg-type]
        want, samplings, names = wishes(len(pairs), logits, sample, taps, likeliest, self.model.spec)
        steers = steerings(as_arrays(steer), len(pairs), self._device.steer, self.model.spec.width)
        results = []
        step = self._device.rows
        if len(pairs) <= step:
            results = self._extend(pairs, want, samplings, names, steers, likeliest)  # type: ignore[arg-type]
        else:
            # More pairs than rows: groups, made all or nothing by letting the finished ones go on failure.
            for i in range(0, len(pairs), step):
                part = slice(i, i + step)
                some = pairs[part], want, samplings[part], names, steers[part]
                results += self._extend(*some, likeliest)  # type: ignore[arg-type]
        return results[0] if single else results

    def save(self, seq: Sequence, path: str | FilePath) -> None:
        """Writes tokens and KV of a sequence to one file, which `load` gives back. A file of that name is replaced, at
        once and only when the new one is whole. In models with recurrent layers it holds their state, too; where that
        is not kept, it is computed anew.

        Raises:
            RequestError: a closed or foreign sequence.
            KeptError: it cannot be written, or its state is lost and was steered.
            OutOfBlocks: there is no room to compute a state. Nothing was written.
        """
        self._need_whole_windows(path)
        self._need_open(seq)
        place = NOWHERE if self._ledger.states is None or not len(seq) else self._state_after(seq)
        tokens, blocks = seq._buffer.data[: len(seq)], self._ledger.blocks_of(seq._path)
        pool, kv = self._pool, self.built.ops.kv
        steer, pure = digest_of(seq._path.salt), seq._pure
        kept.write(
            FilePath(path),
            self._identity,
            tokens,
            seq._prompt_len,
            pool,
            blocks,
            kv,
            steer=steer,
            pure=pure,
            memories=self._device.memories,
            place=place,
        )

    def load(self, path: str | FilePath) -> Sequence:
        """The sequence of a file that `save` wrote, here or in another process: extending it gives the bits that
        extending the original gives. Its full blocks go into the prefix cache.

        Raises:
            KeptError: there is no such file, it is damaged, or it was made by other weights, code or another machine.
            ContextLengthError: it is longer than `max_len`.
            OutOfBlocks: the pool has too few free blocks. After any of these nothing was changed.
        """
        self._need_whole_windows(path)
        pool, memories, states, null = self._pool, self._device.memories, self._ledger.states, self._device.rows
        with kept.opened(FilePath(path), self._identity, pool, memories) as file:
            n = file.length
            if n > self.max_len:
                raise ContextLengthError(f"{n} tokens exceed the context of {self.max_len}", where=str(path))
            if n == 0:
                return self.empty
            self.drain()
            salt = (file.steer, "") if file.steer else ""
            whole = self._extensions([(self._ledger.empty(salt), n)])[0].path
            try:
                tokens = file.fill(pool, self._ledger.blocks_of(whole), memories, null)
            except BaseException:
                self._ledger.free(whole)
                raise
        self._ledger.publish(whole, tokens[: file.pure])
        if states is not None and states.keep(whole, n, null):  # without a place it is computed anew
            self._device.keep(states.drain())
        return Sequence(self, whole, Tokens(tokens, n), file.prompt_len, file.pure)

    @property
    def _pool(self) -> tuple[Pool, ...]:
        """KV of the model's layers that have some of their own; that of a companion is not kept."""
        own = self._device.state.pool[: len(self.model.spec.layers)]
        return tuple(p for p in own if isinstance(p, Pool) and p.k.numel())

    def _state_after(self, seq: Sequence) -> int:
        """The place that holds the state after a sequence, until the next step: its row, a kept one, or a row in which
        it is computed anew."""
        states, n = self._ledger.states, len(seq)
        assert states is not None
        held = self._rows.get(seq._row[0])
        if held is not None and held[:2] == (seq._row[1], n):
            return seq._row[0]
        length, place = states.find(seq._path)
        if length == n:
            self._device.keep(states.drain())
            return place
        if digest_of(seq._path.salt):  # whose vectors are known to those only who gave them
            raise KeptError(
                f"the state after its {n} tokens is not kept any more, and they were steered",
                remedy="extend `rt.empty` by its tokens under the same steering, and save that",
            )
        again, _ = self.extend(seq[: n - 1], seq._buffer.data[n - 1 : n], logits=None)
        return again._row[0]

    def _need_whole_windows(self, path: str | FilePath) -> None:
        if self._ledger.windows is not None:
            raise KeptError(
                "a file holds KV of all tokens, and layers with a window have let go of what they see no more",
                where=str(path),
                remedy="compute the sequence from its tokens, or keep windows whole with window_blocks=0",
            )

    @cached_property
    def _identity(self) -> keys.Key:
        return kept.identity(self.model, self.built)

    def _extensions(self, pairs: list[tuple[Path, int]]) -> list[Extension]:
        """Longer paths for all pairs, or OutOfBlocks. Where more tokens are to come than a step takes, window blocks
        are given step by step."""
        first = 1 if sum(n for _, n in pairs) > self.built.mode.budget else None
        try:
            return self._ledger.extend_many(pairs, first)
        except OutOfBlocks:
            gc.collect()  # sequences in reference cycles hold blocks that nobody can use
            self.drain()
            return self._ledger.extend_many(pairs, first)

    def _extend(
        self,
        pairs: list[tuple[Sequence, Iterable[int]]],
        want: Logits,
        samplings: list[Sampling | None],
        taps: tuple[str, ...],
        steers: list[Steering | None],
        likeliest: int,
    ) -> list[Any]:
        parts = self._plan(pairs, want, samplings, taps, steers)
        if not parts:
            return []
        asked = tuple(name for name in tap_names(self.model.spec) if name in taps) if taps else ()  # fewer traces
        inside: list[list[tuple[Tensor, ...]]] = [[] for _ in parts]
        tokens: list[int] = [0] * len(parts)
        logits: list[list[Tensor]] = [[] for _ in parts]
        found: list[Likeliest | None] = [None] * len(parts)
        states = self._ledger.states
        begun = 0 if states is None else states.stamp
        try:
            while any(p.done < len(p.tokens) for p in parts):
                self._step(parts, want, tokens, logits, asked, inside, likeliest, found)
        except BaseException:
            for p in parts:
                self._ledger.free(p.extension.path)
                self._rows[p.row] = None
            if states is not None:
                states.forget_since(begun)
            raise
        finally:
            for p in parts:
                self._ledger.free(p.base)
            self._ledger.settle()  # the copies are done
        results = []
        for i, p in enumerate(parts):
            self._ledger.publish(p.extension.path, p.buffer.data[: p.pure])
            path = self._ledger.trim(p.extension.path, p.extension.path.length - BACK)
            self._lows[p.row] = path.low
            stamp = next(self._stamps)
            new = Sequence(self, path, p.buffer, p.prompt_len, p.pure, (p.row, stamp))
            self._rows[p.row] = (stamp, path.length, *p.holds)
            if states is not None:
                self._holders[p.row] = weakref.ref(new)
            told: list[Any] = [] if p.sampling is None else [tokens[i]]
            if want:
                told.append(torch.cat(logits[i])[p.again :] if want == "all" else logits[i][-1])
            if likeliest:
                told.append(found[i])
            if taps:
                joined = {n: torch.cat(x)[p.again :] for n, x in zip(asked, zip(*inside[i], strict=True), strict=True)}
                told.append({name: joined[name] for name in taps})
            results.append((new, *(told or [None])))
        return results

    def _plan(
        self,
        pairs: list[tuple[Sequence, Iterable[int]]],
        want: Logits,
        samplings: list[Sampling | None],
        taps: tuple[str, ...],
        steers: list[Steering | None],
    ) -> list[_Part]:
        """Blocks and rows for every pair, all or nothing."""
        arrays = [self.checked(s, t) for s, t in pairs]
        vocab = self.model.spec.vocab
        for (seq, _), sampling in zip(pairs, samplings, strict=True):
            held = self._rows.get(seq._row[0])
            if sampling is not None and not (held is not None and held[0] == seq._row[1] and held[3] == sampling):
                check_sampling(sampling, vocab, self._device.processors)
        self.affordable(sum(map(len, arrays)), want, taps)
        if self._ledger.states is not None:
            _alike(pairs, steers)
        self.drain()
        ledger, states = self._ledger, self._ledger.states
        if states is not None:
            states.settle()
        bases = []
        for (seq, _), array, steer in zip(pairs, arrays, steers, strict=True):
            if len(seq):
                bases.append(ledger.share(seq._path))
            else:
                salt, fresh = salted("", steer), want != "all" and not taps
                bases.append(ledger.match(array, salt) if fresh else ledger.empty(salt))
        places = [NOWHERE] * len(pairs)
        if states is not None:
            places = [self._begin_from(states, seq, bases, i) for i, (seq, _) in enumerate(pairs)]
        bases = [ledger.resumed(base) for base in bases]
        todo = []
        for (seq, _), array, base in zip(pairs, arrays, bases, strict=True):
            again = seq._buffer.data[base.length : len(seq)]
            todo.append(np.concatenate([again, array]) if len(again) else array[base.length - len(seq) :])
        ask = [(base, len(t)) for base, t in zip(bases, todo, strict=True)]
        try:
            extensions = self._extensions(ask)
        except OutOfBlocks:
            for base in bases:
                ledger.free(base)
            raise
        parts, taken, cuts = [], set(), {}
        for (seq, _), array, base, rest, ext, sampling, steer, place in zip(
            pairs, arrays, bases, todo, extensions, samplings, steers, places, strict=True
        ):
            seed = 0
            if sampling is not None:
                seed = sampling.seed if sampling.seed is not None else self.new_seed()
            row, admitted, holds = self._row_for(seq, base, salted("", steer), sampling, seed, taken)
            same = seq._pure == len(seq) and base.salt == salted("", steer)
            taken.add(row)
            if admitted and holds[0] != len(seq):
                cuts[row] = len(seq)
            parts.append(
                _Part(
                    base=base,
                    seq=seq,
                    tokens=rest,
                    buffer=seq._buffer.extend(len(seq), array),
                    extension=ext,
                    row=row,
                    sampling=sampling,
                    seed=seed,
                    prompt_len=seq._prompt_len or len(array),
                    pure=ext.path.length if same else seq._pure,
                    steer=steer,
                    admitted=admitted,
                    state=place,
                    again=max(len(seq) - base.length, 0),
                    holds=holds[1:],
                )
            )
        if cuts:
            self._shorten(cuts)
        return parts

    def _begin_from(self, states: States, seq: Sequence, bases: list[Path], i: int) -> int:
        """The place whose state pair i begins from: the row that holds it, or a kept one, to which its base is cut."""
        held = self._rows.get(seq._row[0])
        if len(seq) and held is not None and held[:2] == (seq._row[1], len(seq)):
            return seq._row[0]
        length, place = states.find(bases[i])
        whole, bases[i] = bases[i], self._ledger.cut(bases[i], length)
        self._ledger.free(whole)
        return place

    def _leave(self, states: States, row: int) -> None:
        """Keeps the state of a row that somebody else is about to take, if it is anybody's."""
        held, holder = self._rows[row], self._holders.pop(row, None)
        seq = None if holder is None else holder()
        if held is not None and seq is not None and seq._path is not CLOSED and held[:2] == (seq._row[1], len(seq)):
            states.keep(seq._path, len(seq), row)

    def _row_for(
        self, seq: Sequence, base: Path, steer: Salt, sampling: Sampling | None, seed: int, taken: set[int]
    ) -> tuple[int, bool, tuple[int, Salt, Sampling | None, int]]:
        """(row, whether it already holds this sequence, or a longer one that this was cut from, with this steering and
        sampling; length, steering, sampling and seed that it has or will be given). Least recently used otherwise."""
        row, stamp = seq._row
        held = self._rows.get(row) if row not in taken else None
        same = held is not None and held[0] == stamp and held[2] == steer
        states = self._ledger.states
        if states is not None:  # which cannot be cut
            same = held is not None and same and held[1] == len(seq)
        elif self._ledger.windows is not None:  # other blocks may stand now where the row has let go of some
            same = same and base.length == len(seq) and base.low >= self._lows[row]
        if held is not None and same and (sampling is None or held[3:] == (sampling, seed)):
            self._rows.move_to_end(row)
            return row, True, held[1:]
        row = next(r for r in self._rows if r not in taken)
        if states is not None:
            self._leave(states, row)
        self._rows.move_to_end(row)
        return row, False, (len(seq), steer, sampling, seed if sampling is not None else 0)

    @torch.inference_mode()
    def _shorten(self, lengths: dict[int, int]) -> None:
        """Takes rows back to these lengths. What stands behind them in the table and the history is written over before
        it is read. 11 us; admitting the row anew takes 75 (one thread of the two-core machine)."""
        length = self._device.state.rows.length
        at = torch.tensor(list(lengths), device=length.device)
        length[at] = torch.tensor(list(lengths.values()), dtype=length.dtype, device=length.device)

    def _step(
        self,
        parts: list[_Part],
        want: Logits,
        tokens: list[int],
        logits: list[list[Tensor]],
        taps: tuple[str, ...],
        inside: list[list[tuple[Tensor, ...]]],
        likeliest: int,
        found: list[Likeliest | None],
    ) -> None:
        """One device step: as many tokens of unfinished parts as the budget allows, at least one each."""
        budget, states = max(self.built.mode.budget, 1), self._ledger.states
        live, sizes = [], []
        for i, p in enumerate(parts):
            n = min(len(p.tokens) - p.done, budget)
            if n > 0:
                if states is not None:
                    at, whole = p.base.length + p.done, p.extension.path.length
                    n = states.chunk(at, n, whole)
                    if (p.done or p.admitted) and states.wanted(at, whole):
                        states.keep(p.extension.path, at, p.row)
                live.append(i)
                sizes.append(n)
                budget -= n
        # Where layers have states, all begin in the first step: what a row begins from may be another's to go on from.
        first = [i for i, p in enumerate(parts) if not p.entered and (i in live or states is not None)]
        admit, grow, copy, near_copy = [], [], [], []
        for i, n in zip(live, sizes, strict=True) if self._ledger.windows is not None else ():
            p = parts[i]
            at = p.base.length + p.done
            p.extension = replace(p.extension, path=self._ledger.trim(p.extension.path, at))
            grow += [(p.row, column, block) for column, block in self._ledger.supply(p.extension.path, at + n)]
        for i in first:
            p = parts[i]
            p.entered = True
            copy += p.extension.copy
            near_copy += p.extension.near_copy
            if p.admitted:
                grow += [(p.row, column, block) for column, block in p.extension.grown]
            else:
                admit.append(
                    Admission(
                        row=p.row,
                        length=p.base.length,
                        blocks=self._ledger.blocks_of(p.extension.path),
                        tokens=p.buffer.data[: p.base.length + len(p.tokens)],
                        prompt_len=p.prompt_len,
                        sampling=p.sampling or PLAIN,
                        seed=p.seed,
                        state=p.state,
                        near=self._nears(self._ledger.blocks_of(p.extension.path).tolist()),
                        steer=() if p.steer is None else p.steer.vectors,
                    )
                )
        last = [parts[i].done + n == len(parts[i].tokens) for i, n in zip(live, sizes, strict=True)]
        T, keep = sum(sizes), [] if states is None else states.drain()
        emit = [end and parts[i].sampling is not None for i, end in zip(live, last, strict=True)]
        chosen = [parts[i].sampling for i, e in zip(live, emit, strict=True) if e]
        names, noise = pipeline_of([(s, False) for s in chosen if s is not None])
        out = self._device.launch(
            StepInput(
                row=np.array([parts[i].row for i in live], np.int32),
                start=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
                token=np.concatenate(
                    [parts[i].tokens[parts[i].done : parts[i].done + n] for i, n in zip(live, sizes, strict=True)]
                ).astype(np.int32),
                emit=np.array(emit, np.int32),
                copy=np.array(copy, np.int32).reshape(-1, 2),
                grow=np.array(grow, np.int32).reshape(-1, 3),
                admit=tuple(admit),
                keep=np.array(keep, np.int32) if keep else None,
                near_grow=self._nears([block for *_, block in grow]),
                near_copy=np.array(near_copy, np.int32) if near_copy else None,
                ask=Ask(
                    pipeline=names,
                    noise=noise,
                    sample=any(emit),
                    logprobs=likeliest if likeliest and any(last) else None,
                    logits=want is not None,
                    picks=T if want == "all" else 0,
                    taps=taps,
                ),
                pick=np.arange(T, dtype=np.int32) if want == "all" else None,
            )
        ).read()
        offset = 0
        for r, (i, n) in enumerate(zip(live, sizes, strict=True)):
            parts[i].done += n
            if emit[r]:
                tokens[i] = int(out.token[r, 0])
            if want == "all":
                logits[i].append(out.logits[offset : offset + n])
            elif want == "last" and last[r]:
                logits[i].append(out.logits[r])
            if likeliest and last[r]:
                assert out.logprobs is not None
                found[i] = Likeliest(out.logprobs.top_ids[r, :likeliest], out.logprobs.top[r, :likeliest])
            if taps:
                inside[i].append(tuple(x[offset : offset + n] for x in out.taps))
            offset += n

    def _nears(self, blocks: list[int]) -> np.ndarray | None:
        """The window blocks of these blocks, where layers have such."""
        return None if self._ledger.windows is None else self._ledger.nears_of(blocks)

    def affordable(self, tokens: int, want: Logits, taps: tuple[str, ...]) -> None:
        """Raises `RequestError` if what so many new tokens are to give takes more than `ALL_LOGITS_BYTES`."""
        vocab, width, item = self.model.spec.vocab, self.model.spec.width, self.model.dtype.itemsize
        if want == "all" and 4 * vocab * tokens > ALL_LOGITS_BYTES:
            raise RequestError(
                f"{tokens} x {vocab} logits take more than {ALL_LOGITS_BYTES} bytes",
                param="logits",
                remedy="extend by fewer tokens at a time",
            )
        if len(taps) * width * item * tokens > ALL_LOGITS_BYTES:
            raise RequestError(
                f"{len(taps)} taps of {tokens} tokens take more than {ALL_LOGITS_BYTES} bytes",
                param="taps",
                remedy="extend by fewer tokens at a time, or name fewer taps",
            )

    def checked(self, seq: Sequence, tokens: Iterable[int]) -> np.ndarray:
        """The tokens as an array, if the sequence can be extended by them; else raises what `extend` does."""
        self._need_open(seq)
        vocab = self.model.spec.vocab
        if isinstance(tokens, list) and len(tokens) == 1 and len(seq) < self.max_len:
            token = tokens[0]
            if type(token) is int and 0 <= token < vocab:  # decoding: 0.6 us instead of 3.7
                return np.array(tokens, np.int32)
        array = np.asarray(tokens if isinstance(tokens, np.ndarray) else list(tokens))
        if array.ndim != 1 or len(array) == 0:
            raise RequestError("extend needs at least one token", param="tokens")
        if not np.issubdtype(array.dtype, np.integer):
            raise RequestError(f"tokens must be integers, got {array.dtype}", param="tokens")
        if array.min() < 0 or array.max() >= vocab:
            bad = int(array[(array < 0) | (array >= vocab)][0])
            raise RequestError(f"token {bad} is outside the vocabulary of {vocab}", param="tokens")
        if len(seq) + len(array) > self.max_len:
            raise ContextLengthError(
                f"{len(seq)} + {len(array)} tokens exceed the context of {self.max_len}", param="tokens"
            )
        return array.astype(np.int32)

    def _need_open(self, seq: Sequence) -> None:
        if seq._runtime is not self:
            raise RequestError("this sequence belongs to another Runtime", param="seq")
        if seq._path is CLOSED:
            raise RequestError("this sequence was closed", param="seq")

    def drain(self) -> int:
        """Returns the blocks of values that were let go, and how many values; `extend` does so itself."""
        n = 0
        while self._dropped:
            self._ledger.free(self._dropped.popleft())
            n += 1
        return n

    def check(self) -> None:
        """Asserts that the ledger's books balance."""
        self.drain()
        self._ledger.check()


def _alike(pairs: list[tuple[Sequence, Iterable[int]]], steers: list[Steering | None]) -> None:
    """Raises RequestError for a sequence that was computed under another steering than the one that is given now."""
    for (seq, _), steer in zip(pairs, steers, strict=True):
        if len(seq) and digest_of(seq._path.salt) != ("" if steer is None else steer.digest):
            raise RequestError(
                "a sequence of a model with recurrent layers is steered alike from its first token on: what is lost of "
                "their states is computed again",
                param="steer",
                remedy="give the steering that it was begun with, or extend `rt.empty` by its tokens under this one",
            )
