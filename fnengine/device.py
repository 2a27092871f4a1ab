"""A device that runs steps: rows, pool and the compiled step behind `host.step.Device`.

It owns the one mutable thing, the `State`, and turns a host-side `StepInput` into a staged `Batch`. Order within a
step: swap out, swap in, states kept, row edits, copies of blocks, then the step itself (KV writes, attention,
sampling), directly or through a captured graph. The edits come seldom and in any number, so they stay outside of
graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fnengine import processors, tree
from fnengine.graphs.bucket import Bucket, fit
from fnengine.graphs.dispatch import Capturing, Choice, Graphs
from fnengine.graphs.report import Usage
from fnengine.host.ahead import Ahead
from fnengine.host.ask import is_rare
from fnengine.host.request import MAX_BIAS, MAX_WATCHED
from fnengine.host.step import BLOCK, NEWEST, Admission, Ask, Scores, StepInput, StepOutput, Ticket
from fnengine.kernels import KVLayout, Ops, memory
from fnengine.kernels.layout import movable
from fnengine.recurrent import take_in
from fnengine.spec import Attending, Mixer, ModelSpec, Recurrent, attentions, recurrents, sight
from fnengine.state import (
    Carry,
    LayerState,
    Memory,
    Out,
    Packed,
    Pool,
    State,
    Top,
    common_columns,
    empty_rows,
    memory_shapes,
    packed_parts,
    pool_shapes,
    rare_columns,
)
from fnengine.step import Step
from fnengine.transforms.companion import Companion


def make_state(
    spec: ModelSpec,
    kv: KVLayout,
    *,
    blocks: int,
    rows: int,
    max_len: int,
    dtype: torch.dtype,
    device: torch.device,
    own: int = 0,
    steer: int = 0,
    kept: int = 0,
    near: int | None = None,
) -> State:
    """Empty state: `blocks` (N) blocks a layer laid out as `kv` says, `rows` (M) rows and the null row, with arguments
    for `own` processors and vectors for `steer` layers; in recurrent layers `kept` places beside those of the rows, in
    layers with a window `near` blocks, where these have their own."""

    def of_layer(mixer: Mixer) -> LayerState:
        if not isinstance(mixer, Recurrent):
            own_blocks = near if near is not None and sight(mixer) else blocks
            return make_pool([mixer], kv, own_blocks, dtype, device)[0]
        states, notes = memory_shapes(mixer)
        every = [(rows + 1 + kept, *shape) for shape in states] + [(rows + 1, *shape) for shape in notes]
        return Memory(*(_zeros(shape, torch.float32, device) for shape in every))

    pool = tuple(of_layer(layer.mixer) for layer in spec.layers)
    columns = -(-max_len // BLOCK)
    sizes: dict[str, Any] = dict(columns=columns, tokens=max_len + 1, vocab=spec.vocab, own=own, near=near is not None)
    sizes["states"] = len(recurrents(spec)) > 0
    return State(pool, empty_rows(rows + 1, **sizes, device=device, steer=(steer, spec.width)))


def beside(state: State, companion: Companion, blocks: int, dtype: torch.dtype) -> State:
    """The state with what a companion needs beside the model's."""
    pool, length, n = (*state.pool, *companion.pool(blocks)), state.rows.length, companion.carry
    kept = [torch.zeros(len(length), n, dtype=dtype, device=length.device) for _ in range(2 if n else 0)]
    return dataclasses.replace(state, pool=pool, carry=Carry(*kept) if kept else None)


def make_pool(
    mixers: Sequence[Attending], kv: KVLayout, blocks: int, dtype: torch.dtype, device: torch.device
) -> tuple[Pool, ...]:
    """Empty KV of each of these layers."""
    return tuple(
        Pool(*(_zeros(shape, kv.element(dtype), device) for shape in pool_shapes(kv, a, blocks))) for a in mixers
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, which cost neither time nor memory before they are written on CPU: a pool of 3.7 GB would take seconds to
    fill."""
    return memory.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


@dataclass
class Launched:
    """A ticket. On CPU the step is done; on CUDA `read` waits for its event."""

    out: Out
    step: StepInput
    choice: Choice[Ask]
    done: torch.cuda.Event | None
    usage: Usage | None = None
    """Counts the step when it is read for the first time."""
    at: float = field(default_factory=time.perf_counter)

    def read(self) -> StepOutput:
        if self.done is not None:
            self.done.synchronize()
        if self.usage is not None:
            _count(self.usage, self.choice, time.perf_counter() - self.at)
            self.usage = None
        R, T, out = self.choice.rows, self.choice.tokens, self.out
        E = self.step.ask.picks or R
        logits = None if out.logits is None else out.logits[:E]
        token, scores = out.token[:E].numpy(), _scores(out.logprobs, E)
        if self.step.pick is None:
            token = token[:, None]
        else:
            place = _places(self.step)
            token = token[place]
            if scores is not None:
                at = place.ravel()
                watched = None if scores.watched is None else scores.watched[at]
                scores = Scores(scores.chosen[at], scores.top_ids[at], scores.top[at], watched)
        taps = tuple(x[:T] for x in out.taps)
        return StepOutput(token, out.count[:R].numpy(), scores, _scores(out.score, T), logits, taps)


def _places(step: StepInput) -> np.ndarray:
    """[R, W] which picked token decides the w-th choice of each row, and the last of a row that chooses nothing; beyond
    what a row may choose, any."""
    W = max(int(step.emit.max(initial=0)), 1)
    place = (step.picked()[1:] - np.maximum(step.emit, 1))[:, None] + np.arange(W)
    return place.clip(0, step.ask.picks - 1)


def _count(usage: Usage, c: Choice[Ask], seconds: float) -> None:
    relaxed = "a graph that computes more than was asked" if c.relaxed else None
    bucket = None if c.key is None else c.bucket
    usage.add(c.tokens, c.rows, bucket=bucket, reason=c.why, relaxed=relaxed, seconds=seconds)


def _scores(top: Top | None, n: int) -> Scores | None:
    if top is None:
        return None
    watched = None if top.watched is None else top.watched[:n].numpy()
    return Scores(top.chosen[:n].numpy(), top.ids[:n].numpy(), top.values[:n].numpy(), watched)


class Steps(Protocol):
    """How steps are padded and run."""

    def choose(self, tokens: int, rows: int, ask: Ask) -> Choice[Ask]: ...

    def run(self, choice: Choice[Ask], *args: Any) -> Out: ...


@dataclass(frozen=True)
class Direct:
    """Steps run as they are, of nearly exact sizes: on CPU, where there is nothing to capture."""

    fn: Callable[..., Out]

    def choose(self, tokens: int, rows: int, ask: Ask) -> Choice[Ask]:
        return Choice(tokens, rows, fit(tokens, rows), ask)

    def run(self, choice: Choice[Ask], *args: Any) -> Out:
        return self.fn(*args)


class TorchDevice:
    """Runs steps of one model on one torch device.

    Args:
        blocks: N, with the null block.
        rows: M, without the null row.
        max_len: longest sequence in tokens.
        host_slots: blocks of host memory for swapping.
        processors: names of the engine's own logits processors, in the order in which the step has them.
        steer: layers that rows may steer, in the order in which the step has them.
        capturing: what of the steps is captured, and how; None runs them as they are.
        companion: what drafts beside the model, whose part of a step `step` does already, with both their params.
        depth: steps the host may have in flight beside the one it reads; by default 1 where steps are captured or run
            on a GPU.
        kept: places of states beside those of the rows; None where no layer has a state.
        windows: window blocks, the null block included, and tokens that the longest window covers; None: layers with a
            window lie in the same blocks as all others. Such a device has no companion and swaps nothing.
    """

    def __init__(
        self,
        spec: ModelSpec,
        params: object,
        step: Step,
        ops: Ops,
        *,
        blocks: int,
        rows: int,
        max_len: int,
        dtype: torch.dtype,
        device: torch.device,
        host_slots: int = 0,
        processors: Sequence[str] = (),
        steer: Sequence[str] = (),
        capturing: Capturing[Ask] | None = None,
        companion: Companion | None = None,
        depth: int | None = None,
        kept: int | None = None,
        windows: tuple[int, int] | None = None,
    ):
        assert windows is None or (companion is None and not host_slots and kept is None)
        self.windows = windows
        self.spec, self.params, self.step, self.ops = spec, params, step, ops
        self.blocks, self.rows, self.max_len, self.host_slots = blocks, rows, max_len, host_slots
        self.kept = kept
        self.device, self.processors, self.steer = device, tuple(processors), tuple(steer)
        self.depth = int(capturing is not None or device.type != "cpu") if depth is None else depth
        self.state = make_state(
            spec,
            ops.kv,
            blocks=blocks,
            rows=rows,
            max_len=max_len,
            dtype=dtype,
            device=device,
            own=len(processors),
            steer=len(steer),
            kept=kept or 0,
            near=None if windows is None else windows[0],
        )
        self.companion = companion
        if companion is not None:
            self.state = beside(self.state, companion, blocks, dtype)
        self.pools = tuple(p for p in self.state.pool if isinstance(p, Pool))
        """KV, of the layers that have any, a companion's behind them."""
        apart = [windows is not None and sight(mixer) != 0 for mixer in attentions(spec)]
        apart += [False] * (len(self.pools) - len(apart))
        pools = [(t, near) for p, near in zip(self.pools, apart, strict=True) for t in (p.k, p.v) if t.numel()]
        self._copied = [t for t, near in pools if not near]
        """What is copied with blocks, ..."""
        self._copied_near = [t for t, near in pools if near]
        """... and with window blocks."""
        self.memories = tuple(p for p in self.state.pool if isinstance(p, Memory))
        """States of the recurrent layers."""
        self._rare: set[int] = set()
        """Rows that hold parameters of rare processors."""
        self._biased: set[int] = set()
        """Rows that hold a bias."""
        self._steered: set[int] = set()
        """Rows that hold a vector."""
        self._guessed: set[int] = set()
        """Rows whose last step held guesses: their states may be behind."""
        self._pinned = device.type == "cuda"
        self._host = tuple(
            Pool(*(torch.zeros(host_slots, *t.shape[1:], dtype=t.dtype, pin_memory=self._pinned) for t in (p.k, p.v)))
            for p in (self.pools if host_slots else ())
        )
        self.usage = None if capturing is None else Usage()
        """What ran in which graph, where steps are captured."""
        self.graphs = None if self.usage is None else self._graphs(capturing, self.usage)
        self.steps: Steps = self.graphs or Direct(self._forward)
        self.draft_usage = None if companion is None or capturing is None else Usage()
        """The same of passes that draft."""
        self.drafting: tuple[Steps, ...] = ()
        """How the first pass of a round of drafts is run, and all later ones."""
        if companion is not None:
            self.drafting = self._passes(companion.first, capturing), self._passes(companion.later, capturing)

    def _graphs(self, capturing: Capturing[Ask] | None, usage: Usage) -> Graphs[Ask] | None:
        return None if capturing is None else Graphs(self._forward, capturing, self._idle, usage.capture)

    def _passes(self, step: Step, capturing: Capturing[Ask] | None) -> Steps:
        """How a step that drafts a token for each row is run: as the target's are."""
        forward = functools.partial(self._forward, step=step)
        if capturing is None or self.draft_usage is None:
            return Direct(forward)
        return Graphs(forward, capturing, self._idle, self.draft_usage.capture)

    @torch.inference_mode()
    def capture(self, progress: Callable[[int, int], None] = lambda _done, _all: None) -> None:
        """Captures what is captured at the start. `progress` is told how many graphs there are, and will be."""
        if self.graphs is None:
            return
        wanted = [(self.graphs, key) for key in self.graphs.wanted()]
        for j, passes in enumerate(self.drafting):
            assert isinstance(passes, Graphs) and self.companion is not None
            any_shape = self.companion.catches_up and not j
            each = [key for key in passes.wanted() if any_shape or key.bucket.tokens == key.bucket.rows]
            wanted += [(passes, key) for key in each]
        with self._current():
            for i, (graphs, key) in enumerate(wanted):
                graphs.capture(key, self.params, self.state)
                progress(i + 1, len(wanted))

    @contextlib.contextmanager
    def running(self, capturing: Capturing[Ask] | None, usage: Usage) -> Iterator[None]:
        """While it is open, steps run through graphs of another kind, or with None through none, and are counted apart:
        to measure them."""
        kept = self.graphs, self.usage, self.steps
        self.usage, self.graphs = usage, self._graphs(capturing, usage)
        self.steps = self.graphs or Direct(self._forward)
        try:
            yield
        finally:
            self.graphs, self.usage, self.steps = kept

    def _current(self) -> contextlib.AbstractContextManager[object]:
        """While it is open, this device is the thread's current one, where events are recorded and kernels launched."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _forward(self, params: object, state: State, packed: Packed, step: Step | None = None) -> Out:
        ints, mask = packed.ints.to(self.device, non_blocking=True), packed.mask
        mask = None if mask is None else mask.to(self.device, non_blocking=True)
        here = dataclasses.replace(packed, ints=ints, mask=mask)
        with processors.captured() if self.graphs is not None else contextlib.nullcontext():
            same, out = (step or self.step)(params, state, here.batch())
        assert same is state, "a step must return the state it was given"
        return out

    def _idle(self, bucket: Bucket, ask: Ask) -> Packed:
        """A step of padding alone, which changes nothing."""
        none = np.zeros(0, np.int32)
        step = StepInput(none, np.zeros(1, np.int32), none, none, none.reshape(0, 2), none.reshape(0, 3), ask=ask)
        return self._packed(step, bucket, ask)

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Ticket:
        """Edits rows, stages the batch and runs the step; on CUDA it returns before the step is done."""
        with self._current():
            return self._launch(step)

    def _launch(self, step: StepInput) -> Launched:
        pool = self.pools
        if step.swap_out is not None and len(step.swap_out):
            _move(pool, step.swap_out[:, 0], self._host, step.swap_out[:, 1])
        if step.swap_in is not None and len(step.swap_in):
            _move(self._host, step.swap_in[:, 0], pool, step.swap_in[:, 1])
        if step.keep is not None:
            self._catch_up(set(step.keep[:, 0].tolist()) & self._guessed)
            self._move_states(step.keep)
        if step.admit:
            self._admit(step.admit)
            if begun := [(a.state, a.row) for a in step.admit if a.state >= 0]:
                self._catch_up({place for place, _ in begun} & self._guessed)
                self._move_states(np.array(begun, np.int32))
        self._grow(step.grow, step.near_grow)
        if len(step.copy) and self._copied:
            self.ops.copy_blocks(self._copied, self._stage(step.copy))
        if step.near_copy is not None:
            self.ops.copy_blocks(self._copied_near, self._stage(step.near_copy))
        if self.memories:
            guessing = set(step.row[step.emit > 1].tolist())
            self._guessed = self._guessed - set(step.row.tolist()) | guessing
        choice = self.steps.choose(len(step.token), len(step.row), step.ask)
        out = self.steps.run(choice, self.params, self.state, self._packed(step, choice.bucket, choice.ask))
        done = None
        if self.depth:  # the next step may write where this one's results lie
            stay = {"logits": out.logits, "taps": out.taps}  # on the device
            if choice.key is not None:
                stay = tree.map_with_path(lambda _, x: x.clone(), stay)
            out = dataclasses.replace(
                tree.map_with_path(_on_host, dataclasses.replace(out, logits=None, taps=())), **stay
            )
            if self.device.type == "cuda":
                done = torch.cuda.Event()
                done.record()
        return Launched(out, step, choice, done, self.usage)

    @torch.inference_mode()
    def draft(self, round: Ahead) -> np.ndarray:
        """[R, K] int32: what the companion drafts after the newest token of each row, in K passes over all rows that
        want so many; beyond a row's count, anything. Lengths of rows are as before."""
        with self._current():
            self._grow(round.grow)
            rows, none, chosen = self.state.rows, np.zeros((0, 3), np.int32), []
            began, row = time.perf_counter(), self._stage(round.row).long()
            rows.length[row] = self._stage(round.begin)
            ones = np.ones(len(round.row), np.int32)
            for j, n in enumerate(round.passes):
                steps = self.drafting[min(j, 1)]
                step = StepInput(
                    row=round.row[:n],
                    start=np.arange(n + 1, dtype=np.int32) if j else round.start,
                    token=NEWEST * ones[:n] if j else round.token,
                    emit=ones[:n] if j else np.minimum(round.count, 1),
                    copy=none[:, :2],
                    grow=none,
                    ask=round.ask,
                )
                choice = steps.choose(len(step.token), n, round.ask)
                steps.run(choice, self.params, self.state, self._packed(step, choice.bucket, choice.ask))
                chosen.append(choice)
            rows.length[row] = length = self._stage(round.length)
            behind = torch.arange(1, int(round.count[0]) + 1, device=self.device)
            at = (length.long()[:, None] + behind).clamp_(max=rows.history.shape[1] - 1)
            tokens = rows.history[row[:, None], at].cpu().numpy()
            if self.draft_usage is not None:
                for choice in chosen:
                    _count(self.draft_usage, choice, (time.perf_counter() - began) / len(chosen))
            return tokens

    def _grow(self, added: np.ndarray, near: np.ndarray | None = None) -> None:
        """Adds blocks, and window blocks, to rows' tables."""
        if len(added):
            grow, rows = self._stage(added).long(), self.state.rows
            rows.table[grow[:, 0], grow[:, 1]] = grow[:, 2].int()
            if near is not None:
                rows.near[grow[:, 0], grow[:, 1]] = self._stage(near)

    @torch.inference_mode()
    def keep(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copies states, (row, place), between two steps: what `StepInput.keep` asks of the next one."""
        if pairs:
            with self._current():
                self._catch_up({row for row, _ in pairs} & self._guessed)
                self._move_states(np.array(pairs, np.int32))

    def _catch_up(self, rows: set[int]) -> None:
        """Lets states take in all tokens of these rows, so that they can be kept."""
        behind = self.state.rows.behind
        if rows and behind is not None:
            row = self._stage(np.array(sorted(rows), np.int32))
            for mixer, m in zip(recurrents(self.spec), self.memories, strict=True):
                take_in(mixer, m, row, behind)
            behind[row.long()] = 0
            self._guessed -= rows

    def _move_states(self, pairs: np.ndarray) -> None:
        """Copies states of all recurrent layers, (from, to) places: all are read before any is written."""
        source, target = self._stage(pairs).long().unbind(1)
        for m in self.memories:
            for t in (m.tail, m.matrix):
                t.index_copy_(0, target, t.index_select(0, source))

    def _stage(self, array: np.ndarray) -> Tensor:
        """The array on the device, some time after this."""
        t = torch.from_numpy(np.ascontiguousarray(array))
        return t.pin_memory().to(self.device, non_blocking=True) if self._pinned else t

    def _packed(self, step: StepInput, bucket: Bucket, ask: Ask) -> Packed:
        """The batch, padded, still on the host: the last padding row owns the padding tokens."""
        T, R = len(step.token), len(step.row)
        parts = packed_parts(bucket, ask)
        ints = torch.empty(parts[-1].stop, dtype=torch.int32, pin_memory=self._pinned)
        array = ints.numpy()
        row, start, token, emit, target, pick = (array[part] for part in parts)
        row[:R], row[R:] = step.row, self.rows
        start[: R + 1], start[R + 1 :] = step.start, T
        start[-1] = bucket.tokens
        token[:T], token[T:] = step.token, 0
        emit[:R], emit[R:] = step.emit, 0
        if ask.score is not None:
            target[:] = -1
            if step.target is not None:
                target[:T] = step.target
        pick[:] = 0
        if step.pick is not None:
            pick[: len(step.pick)] = step.pick
            pick[len(step.pick) :] = step.pick[0]  # once more, under the same mask: the same token is chosen
        return Packed(ints, bucket, ask, self._mask(step, ask.picks or bucket.rows) if ask.masked else None)

    def _mask(self, step: StepInput, rows: int) -> Tensor:
        """The step's masks, padded with what its first row allows, or everything."""
        mask = torch.empty(rows, -(-self.spec.vocab // 32), dtype=torch.int32, pin_memory=self._pinned)
        array, n = mask.numpy(), 0 if step.mask is None else len(step.mask)
        if step.mask is not None:
            array[:n] = step.mask
        array[n:] = -1 if step.mask is None else step.mask[0]
        return mask

    def _admit(self, admissions: tuple[Admission, ...]) -> None:
        """Writes whole rows. Rare (once a request and after preemption), so plain indexing does."""
        rows = self.state.rows
        index = self._stage(np.array([a.row for a in admissions], np.int64))

        def put(name: str, dtype: type, values: list) -> None:
            getattr(rows, name)[index] = self._stage(np.array(values, dtype))

        put("length", np.int32, [a.length for a in admissions])
        put("prompt_len", np.int32, [a.prompt_len for a in admissions])
        put("seed", np.int64, [_signed(a.seed) for a in admissions])
        if rows.behind is not None:
            put("behind", np.int32, [0 for _ in admissions])
        for name, values in common_columns([a.sampling for a in admissions]).items():
            getattr(rows, name)[index] = self._stage(values)
        # What rare processors read is written where it is asked for, and undone when the row goes to somebody else.
        asking = {a.row: is_rare(a.sampling) for a in admissions}
        edited = [a for a in admissions if asking[a.row] or a.row in self._rare]
        if edited:
            at = self._stage(np.array([a.row for a in edited], np.int64))
            samplings = [a.sampling for a in edited]
            for name, values in rare_columns(samplings, self.spec.vocab, self.processors).items():
                getattr(rows, name)[at] = self._stage(values)
            self._rare = self._rare - asking.keys() | {row for row, rare in asking.items() if rare}
        if edited := [a for a in admissions if a.steer or a.row in self._steered]:
            vectors = np.zeros((len(edited), len(self.steer), self.spec.width), np.float32)
            for i, a in enumerate(edited):
                for name, vector in a.steer:
                    vectors[i, self.steer.index(name)] = vector
            rows.steer[self._stage(np.array([a.row for a in edited], np.int64))] = self._stage(vectors)
            self._steered = self._steered - {a.row for a in edited} | {a.row for a in edited if a.steer}
        biased = {a.row for a in admissions if a.sampling.logit_bias or a.suppress}
        if edited := [a for a in admissions if a.row in biased or a.row in self._biased]:
            at = self._stage(np.array([a.row for a in edited], np.int64))
            for name, values in _biases(edited).items():
                getattr(rows, name)[at] = self._stage(values)
            self._biased = self._biased - {a.row for a in edited} | biased
        if watching := [a for a in admissions if a.watched]:  # nobody reads what an earlier sequence left in other rows
            ids = np.full((len(watching), MAX_WATCHED), -1, np.int32)
            for given, a in zip(ids, watching, strict=True):
                given[: len(a.watched)] = a.watched
            rows.watched[self._stage(np.array([a.row for a in watching], np.int64))] = self._stage(ids)
        # One write for all rows; what is put behind a row's tokens is written over before it is read.
        rows.table[index] = self._stage(_ragged([a.blocks for a in admissions], rows.table.shape[1]))
        if self.windows is not None:
            nears = [a.near for a in admissions if a.near is not None]
            rows.near[index] = self._stage(_ragged(nears, rows.near.shape[1]))
        if most := max(len(a.tokens) for a in admissions):
            rows.history[index, :most] = self._stage(_ragged([a.tokens for a in admissions], most))


def _ragged(arrays: Sequence[np.ndarray], width: int) -> np.ndarray:
    """[n, width] int32: the arrays as rows, filled up with 0."""
    out = np.zeros((len(arrays), width), np.int32)
    for row, array in zip(out, arrays, strict=True):
        row[: len(array)] = array
    return out


def _biases(admissions: Sequence[Admission]) -> dict[str, np.ndarray]:
    """Columns of the rows' sparse (id, bias, until) lists: logit_bias without end, suppressed ids until their place."""
    shape = len(admissions), MAX_BIAS
    ids, value, until = np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int32)
    for r, a in enumerate(admissions):
        entries = [(i, min(max(b, -100.0), 100.0), np.iinfo(np.int32).max) for i, b in a.sampling.logit_bias]
        entries += [(i, -np.inf, a.suppress_until) for i in a.suppress]
        assert len(entries) <= MAX_BIAS, f"{len(entries)} bias entries, a row holds {MAX_BIAS}"
        for j, (i, b, u) in enumerate(entries):
            ids[r, j], value[r, j], until[r, j] = i, b, u
    return {"bias_id": ids, "bias": value, "bias_until": until}


def _signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _move(source: tuple[Pool, ...], at: np.ndarray, target: tuple[Pool, ...], to: np.ndarray) -> None:
    """Copies blocks between pools that may live on different devices, layer by layer."""
    i, j = torch.from_numpy(at.astype(np.int64)), torch.from_numpy(to.astype(np.int64))
    for s, t in zip(source, target, strict=True):
        for a, b in ((movable(s.k), movable(t.k)), (movable(s.v), movable(t.v))):
            b[j.to(b.device)] = a[i.to(a.device)].to(b.device)


def _on_host(_path: str, x: Tensor) -> Tensor:
    """A copy in memory of the host's own, which is there once the device has come to it."""
    return x.clone() if x.device.type == "cpu" else x.to("cpu", non_blocking=True)
