"""Recording: the native calls of a function of tensors, kept as a list that runs again without Python.

On CPU a step of few tokens is over in milliseconds, and between two kernels Python costs more than its usual
microseconds: weights have just streamed through every cache and thrown the interpreter out. So the calls are written
down once for a shape, with the addresses they were given, and made again from C++. It is what a CUDA graph is on a GPU,
under the same conditions: fixed shapes, buffers from a pool of its own, and inputs that are found again (here by moving
every address that lies in an input to where that input is now).

While a recorder is active, the thread's native calls go through `invoke` and its buffers come from `empty`. Whatever
else computes something would be missing from the list, so any other operator makes the recording fail.
"""

from __future__ import annotations

import ctypes
import math
import struct
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fnengine.kernels import native
from fnengine.kernels.library import IMPLEMENTATIONS
from fnengine.kernels.memory import zeros

ARGUMENTS = 32
"""Most arguments of a call, as in `csrc/program.cpp`."""
LINE = 64
RECORDED_TOKENS = 64
"""Largest step that is recorded: with 28 layers Python costs some 7 ms, 2 % of a step of 128 tokens."""


class NotRecordable(Exception):
    """Something happened that the list of calls would not repeat."""


class Arena:
    """Memory for buffers whose addresses recordings hold. All recordings may share it, because one runs at a time."""

    def __init__(self, size: int):
        self._memory = zeros((size,), torch.uint8)  # pages are not touched before they are used
        self._free: list[tuple[int, int]] = []
        self._begin = self._memory.data_ptr()
        self._size = size
        self.reset()

    def reset(self) -> None:
        """Everything is free again."""
        self._free = [(self._begin, self._size)]
        self._turn = object()

    def tensor(self, shape: Sequence[int], stride: Sequence[int] | None, dtype: torch.dtype) -> Tensor:
        """A buffer; its memory is free again once its storage is gone. Raises NotRecordable when all is in use."""
        shape = tuple(shape)
        count = math.prod(shape) if stride is None else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        size = max(-(-count * dtype.itemsize // LINE) * LINE, LINE)
        for i, (at, room) in enumerate(self._free):
            if room >= size:
                self._free[i] = (at + size, room - size)
                break
        else:
            raise NotRecordable(f"buffers take more than {self._size} bytes")
        owner = (ctypes.c_uint8 * size).from_address(at)
        weakref.finalize(owner, self._release, at, size, self._turn).atexit = False
        flat = torch.frombuffer(owner, dtype=dtype)
        return flat[:count].view(shape) if stride is None else flat.as_strided(shape, stride)

    def _release(self, at: int, size: int, turn: object) -> None:
        if turn is not self._turn:
            return
        merged = []
        for start, room in sorted([*self._free, (at, size)]):
            if merged and merged[-1][0] + merged[-1][1] == start:
                merged[-1] = (merged[-1][0], merged[-1][1] + room)
            elif room:
                merged.append((start, room))
        self._free = merged


@dataclass
class Recorder:
    """What is written down: (address of a function, whether its result is an error code, its arguments)."""

    arena: Arena
    calls: list[tuple[int, bool, tuple[int, ...]]] = field(default_factory=list)


_active: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def address(function: Any) -> int:
    """Where a function of a library begins."""
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def bits(value: float) -> int:
    """A double as the integer of the same 64 bits: native functions take no floating-point arguments."""
    return struct.unpack("q", struct.pack("d", value))[0]


def invoke(function: Any, *args: int | None, checked: bool = False) -> Any:
    """Calls a library's function; `checked` says that a result other than 0 is an error."""
    recorder = _active.get()
    if recorder is not None:
        recorder.calls.append((address(function), checked, tuple(a or 0 for a in args)))
    return function(*args)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised CPU tensor."""
    recorder = _active.get()
    return torch.empty(shape, dtype=dtype) if recorder is None else recorder.arena.tensor(shape, None, dtype)


def recordable_empty(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`original(shape, stride, dtype)`, from the arena while something is recorded."""

    def empty_strided(shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
        recorder = _active.get()
        return original(shape, stride, dtype) if recorder is None else recorder.arena.tensor(shape, stride, dtype)

    return empty_strided


def recordable(function: Callable[..., None], at: int) -> Callable[..., None]:
    """A generated kernel that takes tensors and integers, whose machine code begins at `at`."""

    def kernel(*args: Any) -> None:
        recorder = _active.get()
        if recorder is not None:
            if any(isinstance(a, float) for a in args):
                raise NotRecordable("a kernel takes a floating-point argument")
            words = tuple(a.data_ptr() if isinstance(a, Tensor) else int(a) for a in args)
            recorder.calls.append((at, False, words))
        function(*args)

    return kernel


class _Watch(TorchDispatchMode):
    """Lets views and our own operators pass, and nothing else that computes."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether torch should guard this mode against Dynamo. It does so by importing it, in the first step that is
        recorded: 800 modules, 75 MB that stay, and more than a second; and nothing here runs under Dynamo."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in IMPLEMENTATIONS:
            with self:  # what it does is watched, too
                return IMPLEMENTATIONS[func](*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        views = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
        if func._schema.is_mutable or not views or any(t.untyped_storage().data_ptr() not in given for t in views):
            raise NotRecordable(f"{func} computes something")
        return out


@dataclass(frozen=True)
class Program:
    """A recorded function: `run(inputs)` does what it did, on inputs of the same shapes and strides."""

    words: np.ndarray
    moves: np.ndarray
    """[n, 3] int64 of (word, input, offset)"""
    output: Tensor
    held: tuple[Any, ...]
    """Whatever the addresses belong to."""

    @property
    def calls(self) -> int:
        return len(self.words)

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output, which the next run of any program of the same arena overwrites."""
        bases = np.array([t.data_ptr() for t in inputs], np.int64)
        library = native.load(native.COMMON).library
        assert library is not None
        failed = library.fn_run_program(
            self.words.ctypes.data, len(self.words), self.moves.ctypes.data, len(self.moves), bases.ctypes.data
        )
        assert not failed, f"call {failed} of {len(self.words)} failed: an index is out of range"
        return self.output


def record(function: Callable[..., Tensor], inputs: Sequence[Tensor], arena: Arena, held: tuple[Any, ...]) -> Program:
    """The program of `function(*inputs)`, which is run once for it.

    Args:
        held: what the function uses beside its inputs; kept alive, because the program holds addresses in it.

    Raises:
        NotRecordable: the function does something besides native calls.
    """
    arena.reset()
    recorder = Recorder(arena)
    token = _active.set(recorder)
    try:
        with _Watch():
            output = function(*inputs)
    finally:
        _active.reset(token)
    ranges = [(t.data_ptr(), t.data_ptr() + _extent(t)) for t in inputs]
    words = np.zeros((len(recorder.calls), ARGUMENTS + 2), np.int64)
    moves = []
    for c, (at, checked, args) in enumerate(recorder.calls):
        if len(args) > ARGUMENTS:
            raise NotRecordable(f"a call has {len(args)} arguments")
        words[c, :2] = at, checked
        words[c, 2 : 2 + len(args)] = args
        for i, a in enumerate(args):
            for number, (begin, end) in enumerate(ranges):
                if begin <= a < end:
                    moves.append((c * words.shape[1] + 2 + i, number, a - begin))
                    break
    return Program(words, np.array(moves, np.int64).reshape(-1, 3), output, held)


def _extent(t: Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) * t.element_size()
