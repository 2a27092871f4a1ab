"""A device that runs steps: rows, pool and the compiled step behind `host.step.Device`.

It owns the one mutable thing, the `State`, and turns a host-side `StepInput` into a staged `Batch`. Order within a
step: swap out, swap in, row edits, then the step itself (block copies, KV writes, attention, sampling).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fnengine.graphs.bucket import fit
from fnengine.host.request import MAX_BIAS
from fnengine.host.step import BLOCK, Admission, Scores, StepInput, StepOutput, Ticket
from fnengine.kernels import KVLayout, Ops, memory
from fnengine.spec import ModelSpec
from fnengine.state import Batch, Out, Pool, Rows, State, Top
from fnengine.step import Step


def make_state(
    spec: ModelSpec, kv: KVLayout, *, blocks: int, rows: int, max_len: int, dtype: torch.dtype, device: torch.device
) -> State:
    """Empty state: `blocks` (N) blocks a layer laid out as `kv` says, `rows` (M) rows and the null row."""
    M, P = rows + 1, -(-max_len // BLOCK)

    def full(value: float, dt: torch.dtype, *shape: int) -> Tensor:
        return torch.full((M, *shape), value, dtype=dt, device=device)

    f32, i32 = torch.float32, torch.int32
    pool = tuple(
        Pool(*(_zeros(shape, kv.element(dtype), device) for shape in kv.shapes(blocks, BLOCK, a.kv_heads, a.width)))
        for a in (layer.mixer for layer in spec.layers)
    )
    return State(
        pool,
        Rows(
            length=full(0, i32),
            table=full(0, i32, P),
            history=full(0, i32, max_len + 1),
            prompt_len=full(0, i32),
            temperature=full(0, f32),
            top_k=full(0, i32),
            top_p=full(1, f32),
            min_p=full(0, f32),
            frequency=full(0, f32),
            presence=full(0, f32),
            repetition=full(1, f32),
            seed=full(0, torch.int64),
            bias_id=full(-1, i32, MAX_BIAS),
            bias=full(0, f32, MAX_BIAS),
            bias_until=full(0, i32, MAX_BIAS),
        ),
    )


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, which cost neither time nor memory before they are written on CPU: a pool of 3.7 GB would take seconds to
    fill."""
    return memory.zeros(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


@dataclass(frozen=True)
class Launched:
    """A ticket. On CPU the step is done; on CUDA `read` waits for its event."""

    out: Out
    tokens: int
    rows: int
    done: torch.cuda.Event | None
    all_logits: bool
    """`out.logits` has a row per token, not per batch row."""

    def read(self) -> StepOutput:
        if self.done is not None:
            self.done.synchronize()
        R, T, out = self.rows, self.tokens, self.out
        logits = out.logits
        if logits is not None:
            logits = logits[: T if self.all_logits else R]
        return StepOutput(
            token=out.token[:R].numpy(),
            count=out.count[:R].numpy(),
            logprobs=_scores(out.logprobs, R),
            score=_scores(out.score, T),
            logits=logits,
        )


def _scores(top: Top | None, n: int) -> Scores | None:
    if top is None:
        return None
    return Scores(top.chosen[:n].numpy(), top.ids[:n].numpy(), top.values[:n].numpy())


class TorchDevice:
    """Runs steps of one model on one torch device.

    Args:
        blocks: N, with the null block.
        rows: M, without the null row.
        max_len: longest sequence in tokens.
        host_slots: blocks of host memory for swapping.
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
    ):
        self.spec, self.params, self.step, self.ops = spec, params, step, ops
        self.blocks, self.rows, self.max_len, self.host_slots = blocks, rows, max_len, host_slots
        self.device = device
        self.depth = 0 if device.type == "cpu" else 1
        self.state = make_state(spec, ops.kv, blocks=blocks, rows=rows, max_len=max_len, dtype=dtype, device=device)
        pinned = device.type == "cuda"
        self._host = tuple(
            Pool(*(torch.zeros(host_slots, *t.shape[1:], dtype=t.dtype, pin_memory=pinned) for t in (p.k, p.v)))
            for p in (self.state.pool if host_slots else ())
        )

    @torch.inference_mode()
    def launch(self, step: StepInput) -> Ticket:
        """Edits rows, stages the batch and runs the step; on CUDA it returns before the step is done."""
        pool = self.state.pool
        if step.swap_out is not None and len(step.swap_out):
            _move(pool, step.swap_out[:, 0], self._host, step.swap_out[:, 1])
        if step.swap_in is not None and len(step.swap_in):
            _move(self._host, step.swap_in[:, 0], pool, step.swap_in[:, 1])
        if step.admit:
            self._admit(step.admit)
        if len(step.grow):
            grow = self._stage(step.grow).long()
            self.state.rows.table[grow[:, 0], grow[:, 1]] = grow[:, 2].int()
        state, out = self.step(self.params, self.state, self._batch(step))
        assert state is self.state, "a step must return the state it was given"
        all_logits = step.ask.logits == "all"
        if self.device.type == "cpu":
            return Launched(out, len(step.token), len(step.row), None, all_logits)
        on_host = [_to_host(x) for x in (out.token, out.count, out.logprobs, out.score)]
        done = torch.cuda.Event()
        done.record()
        return Launched(Out(*on_host, out.logits), len(step.token), len(step.row), done, all_logits)  # pyright: ignore[reportCallIssue]

    def _stage(self, array: np.ndarray) -> Tensor:
        t = torch.from_numpy(np.ascontiguousarray(array))
        return t if self.device.type == "cpu" else t.pin_memory().to(self.device, non_blocking=True)

    def _batch(self, step: StepInput) -> Batch:
        """The staged batch, padded: the last padding row owns the padding tokens. One host-to-device copy."""
        T, R = len(step.token), len(step.row)
        b = fit(T, R)
        C = len(step.copy)
        sizes = (b.rows, b.rows + 1, b.tokens, b.rows, 2 * C, 0 if step.target is None else b.tokens)
        packed = np.zeros(sum(sizes), np.int32)
        row, start, token, emit, copy, target = np.split(packed, np.cumsum(sizes[:-1]))
        row[:R], row[R:] = step.row, self.rows
        start[: R + 1], start[R + 1 :] = step.start, T
        start[-1] = b.tokens
        token[:T], emit[:R] = step.token, step.emit
        copy[:] = step.copy.reshape(-1)
        if step.target is not None:
            target[:T], target[T:] = step.target, -1
        parts = self._stage(packed).split(sizes)
        return Batch(
            row=parts[0],
            start=parts[1],
            token=parts[2],
            emit=parts[3],
            copy=parts[4].view(C, 2),
            target=None if step.target is None else parts[5],
            ask=step.ask,
        )

    def _admit(self, admissions: tuple[Admission, ...]) -> None:
        """Writes whole rows. Rare (once a request and after preemption), so plain indexing does."""
        rows = self.state.rows
        index = self._stage(np.array([a.row for a in admissions], np.int64))

        def put(name: str, dtype: type, values: list) -> None:
            getattr(rows, name)[index] = self._stage(np.array(values, dtype))

        s = [a.sampling for a in admissions]
        put("length", np.int32, [a.length for a in admissions])
        put("prompt_len", np.int32, [a.prompt_len for a in admissions])
        put("temperature", np.float32, [x.temperature for x in s])
        put("top_k", np.int32, [max(x.top_k, 0) for x in s])
        put("top_p", np.float32, [x.top_p for x in s])
        put("min_p", np.float32, [x.min_p for x in s])
        put("frequency", np.float32, [x.frequency_penalty for x in s])
        put("presence", np.float32, [x.presence_penalty for x in s])
        put("repetition", np.float32, [x.repetition_penalty for x in s])
        put("seed", np.int64, [_signed(a.seed) for a in admissions])
        bias = [_bias(a) for a in admissions]
        put("bias_id", np.int32, [b[0] for b in bias])
        put("bias", np.float32, [b[1] for b in bias])
        put("bias_until", np.int32, [b[2] for b in bias])
        for a in admissions:
            rows.table[a.row].zero_()
            rows.table[a.row, : len(a.blocks)] = self._stage(a.blocks.astype(np.int32))
            if len(a.tokens):
                rows.history[a.row, : len(a.tokens)] = self._stage(a.tokens.astype(np.int32))


def _bias(a: Admission) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The row's sparse (id, bias, until) list: logit_bias without end, suppressed ids until their position."""
    ids, value = np.full(MAX_BIAS, -1, np.int32), np.zeros(MAX_BIAS, np.float32)
    until = np.zeros(MAX_BIAS, np.int32)
    entries = [(i, min(max(b, -100.0), 100.0), np.iinfo(np.int32).max) for i, b in a.sampling.logit_bias]
    entries += [(i, -np.inf, a.suppress_until) for i in a.suppress]
    assert len(entries) <= MAX_BIAS, f"{len(entries)} bias entries, a row holds {MAX_BIAS}"
    for j, (i, b, u) in enumerate(entries):
        ids[j], value[j], until[j] = i, b, u
    return ids, value, until


def _signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    seed &= (1 << 64) - 1
    return seed - (1 << 64) if seed >= 1 << 63 else seed


def _move(source: tuple[Pool, ...], at: np.ndarray, target: tuple[Pool, ...], to: np.ndarray) -> None:
    """Copies blocks between pools that may live on different devices, layer by layer."""
    i, j = torch.from_numpy(at.astype(np.int64)), torch.from_numpy(to.astype(np.int64))
    for s, t in zip(source, target, strict=True):
        for a, b in ((s.k, t.k), (s.v, t.v)):
            b[j.to(b.device)] = a[i.to(a.device)].to(b.device)


def _to_host(x: Tensor | Top | None) -> Tensor | Top | None:
    if x is None:
        return None
    if isinstance(x, Tensor):
        return x.to("cpu", non_blocking=True)
    return dataclasses.replace(
        x, **{f.name: getattr(x, f.name).to("cpu", non_blocking=True) for f in dataclasses.fields(x)}
    )
