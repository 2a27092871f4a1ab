"""A pure function over explicit state -> the same function, captured once and replayed.

    step = graphs.capture(fn, params, state, batch, fixed=(0, 1))
    out = step(params, state, batch)

What a graph does with memory is the contract of what comes back, on a GPU and in its twin on CPU alike:

- `fixed` arguments are read and written where they were when the function was captured: the same tensors, or others at
  the same addresses. Of all other arguments the tensors are copied into buffers of the graph's own.
- Everything that is not a tensor is as it was then: sizes, flags, numbers that Python computed.
- What comes back, other than fixed arguments, lies in buffers of the graph's own, too. They are valid until the next
  call of any function that the same recorder captured; whoever wants them for longer copies them.
- The function runs once or twice while it is captured, with the arguments it is given, so what it does to fixed
  arguments then must be harmless.
"""

from __future__ import annotations

import gc
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fnengine import tree
from fnengine.errors import GraphError

Around = Callable[[Callable[..., Tensor], tuple[Any, ...]], Tensor]
"""Calls a function with arguments in its own way."""
Outside = Callable[[Around], AbstractContextManager[None]]
"""While the context is open, calls that must stay out of a graph go through the `Around` that it was given."""


class Recording(Protocol):
    """Something that can be done again."""

    @property
    def bytes(self) -> int:
        """Memory that it took, beyond what its recorder had."""
        ...

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Makes recordings, which share memory for what lives inside of them."""

    def buffer(self, like: Tensor) -> Tensor:
        """A new tensor on the recorder's device, with the same values."""
        ...

    def record(self, run: Callable[[], list[Tensor]]) -> tuple[Recording, list[Tensor]]:
        """(the recording of `run`, the tensors that it returned, which each replay writes anew)"""
        ...


@dataclass(frozen=True)
class _Fixed:
    """An argument as it was, and what another one must have in common with it."""

    value: Any
    structure: Any
    leaves: tuple[tuple[str, Any], ...]
    """(path, what `_where` says)"""


class Captured:
    """A captured function, called as the function was. See the module for what holds of its arguments and results.

    Raises, when called:
        GraphError: a fixed argument lies elsewhere, or another has another structure, shape or dtype.
    """

    def __init__(
        self, fixed: dict[int, _Fixed], copied: dict[int, tuple[Any, Any]], recording: Recording, out: Any, s: float
    ):
        self._fixed, self._copied, self._recording, self._out = fixed, copied, recording, out
        self._arguments = len(fixed) + len(copied)
        self.seconds = s
        """What capturing took."""

    @property
    def bytes(self) -> int:
        """Memory that this graph alone takes."""
        return self._recording.bytes

    def __call__(self, *args: Any) -> Any:
        if len(args) != self._arguments:
            raise GraphError(f"captured with {self._arguments} arguments, called with {len(args)}")
        for i, known in self._fixed.items():
            if args[i] is not known.value:
                _check_fixed(i, known, args[i])
        for i, (structure, buffers) in self._copied.items():
            if tree.structure((args[i],)) != structure:
                raise GraphError(
                    "another structure than it was captured with",
                    where=f"argument {i}",
                    remedy="capture a graph for each structure",
                )
            for (path, given), (_, buffer) in zip(tree.items((args[i],)), buffers, strict=True):
                if given.shape != buffer.shape or given.dtype != buffer.dtype:
                    raise GraphError(
                        f"{_like(given)}, captured with {_like(buffer)}",
                        where=f"argument {i}{path[1:]}",
                        remedy="pad it to the size that was captured",
                    )
                buffer.copy_(given, non_blocking=True)
        self._recording.replay()
        return self._out


def default() -> Recorder:
    """A new recorder: of CUDA graphs where there is a GPU, else their twin."""
    return CudaGraphs() if torch.cuda.is_available() else Twin()


def capture(
    fn: Callable[..., Any], *args: Any, fixed: tuple[int, ...] = (), recorder: Recorder | None = None
) -> Captured:
    """`fn` of these arguments, captured.

    Args:
        fn: of trees (dataclasses, tuples, dicts) of tensors, or tensors; gives such a tree.
        args: examples, of the sizes that the graph is for.
        fixed: numbers of the arguments that stay where they are (weights, state), `fn` may write to them.
        recorder: shares memory among all that it captures; by default a new one, of CUDA graphs where there is a GPU,
            and else their twin.

    Raises:
        GraphError: the function does something that a graph cannot repeat; the message says what.

    Example:
        >>> double = capture(lambda x: 2 * x, torch.ones(3))
        >>> double(torch.arange(3.0))
        tensor([0., 2., 4.])
    """
    recorder = default() if recorder is None else recorder
    t0 = time.perf_counter()
    inputs: list[Any] = []
    known: dict[int, _Fixed] = {}
    copied: dict[int, tuple[Any, Any]] = {}
    for i, arg in enumerate(args):
        if i in fixed:
            leaves = tuple((path, _where(x)) for path, x in tree.items((arg,)))
            known[i] = _Fixed(arg, tree.structure((arg,)), leaves)
            inputs.append(arg)
        else:
            own = tree.map_with_path(lambda _, x: recorder.buffer(x), (arg,))
            copied[i] = tree.structure((arg,)), list(tree.items(own))
            inputs.append(own[0])
    stays = {id(x) for i in known for x in tree.leaves((args[i],))}
    whole: Any = None

    def run() -> list[Tensor]:
        nonlocal whole
        whole = fn(*inputs)
        return [x for x in tree.leaves((whole,)) if id(x) not in stays]

    recording, new = recorder.record(run)
    fresh = iter(new)
    out = tree.map_with_path(lambda _, x: x if id(x) in stays else next(fresh), (whole,))[0]
    return Captured(known, copied, recording, out, time.perf_counter() - t0)


def _where(x: Tensor) -> tuple[Any, ...]:
    return x.data_ptr(), tuple(x.shape), x.stride(), x.dtype


def _like(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _check_fixed(i: int, known: _Fixed, given: Any) -> None:
    if tree.structure((given,)) != known.structure:
        raise GraphError("another structure than it was captured with", where=f"argument {i}")
    for (path, x), (_, was) in zip(tree.items((given,)), known.leaves, strict=True):
        if _where(x) != was:
            raise GraphError(
                "lies elsewhere, or is of another shape, than when it was captured",
                where=f"argument {i}{path[1:]}",
                remedy="write into the tensor that was captured, or leave the argument out of `fixed`",
            )


# ---- CUDA graphs ------------------------------------------------------------------------------------------------


class _Pieces:
    """Graphs, and the calls that stay out between them, in order."""

    def __init__(self) -> None:
        self.parts: list[Callable[[], Any]] = []
        self.bytes = 0

    def replay(self) -> None:
        for part in self.parts:
            part()


class CudaGraphs:
    """Records CUDA graphs; all share one memory pool, which works out because they replay one after another.

    Args:
        outside: calls that stay out of graphs, each run as it is between two of them (`Outside`); None for none.
    """

    def __init__(self, device: torch.device | None = None, outside: Outside | None = None):
        self.device = torch.device("cuda") if device is None else device
        self.outside = outside
        self._stream = torch.cuda.Stream(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()
        """Those that use the pool; it ends with the last of them."""

    def buffer(self, like: Tensor) -> Tensor:
        return like.to(self.device, copy=True)

    def record(self, run: Callable[[], list[Tensor]]) -> tuple[Recording, list[Tensor]]:
        pieces = _Pieces()
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _no_collection():
            run()  # kernels are compiled and libraries make up their minds outside of a graph
            torch.cuda.synchronize(self.device)
            # What the run left to this stream no graph can have, and while one is captured nothing is given back.
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self.device)
            out = self._capture(run, pieces)
            torch.cuda.synchronize(self.device)
            pieces.bytes = max(0, free - torch.cuda.mem_get_info(self.device)[0])
        current.wait_stream(self._stream)
        return pieces, out

    def _capture(self, run: Callable[[], list[Tensor]], pieces: _Pieces) -> list[Tensor]:
        graph = self._begin()

        def around(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
            nonlocal graph
            _end(graph)
            graph.replay()  # what the call is about to read was captured, not computed
            pieces.parts.append(graph.replay)
            out = fn(*args)
            pieces.parts.append(lambda: out.copy_(fn(*args)))
            graph = self._begin()
            return out

        try:
            with nullcontext() if self.outside is None else self.outside(around):
                out = run()
            _end(graph)
        except BaseException as e:
            with suppress(Exception):  # what broke the capture is raised, not what breaks with it
                _end(graph)
            if isinstance(e, RuntimeError):  # CUDA's errors, and torch's: there are many, and none says what to do
                raise GraphError(
                    f"could not be captured: {type(e).__name__}: {str(e).partition(chr(10))[0]}",
                    remedy="--graph-mode NONE, or --enforce-eager, serves without graphs",
                ) from e
            raise
        pieces.parts.append(graph.replay)
        return out

    def _begin(self) -> torch.cuda.CUDAGraph:
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        self._graphs.add(graph)
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        return graph


def _end(graph: torch.cuda.CUDAGraph) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # two calls that stay out in a row
        graph.capture_end()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's collector stays away: freeing a tensor of somebody else's in the middle of a capture breaks it."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


# ---- the twin ---------------------------------------------------------------------------------------------------


class Twin:
    """Stands in for CUDA graphs on any device: a replay is the function again, over the same buffers.

    It is as strict as a graph about memory, so that bugs which only a graph has come out on CPU: arguments and Python
    values are those of the capture; what a graph gave is overwritten with rubbish by the next replay of any; and an
    operator whose work depends on data, or that a graph would wait for, is refused.

    Args:
        outside: as for `CudaGraphs`: such calls may do what a graph cannot.
        refuse: False lets a function through that a graph would refuse.
    """

    def __init__(self, outside: Outside | None = None, refuse: bool = True):
        self.outside, self.refuse = outside, refuse
        self._given: list[Tensor] = []
        """All tensors that recordings of this recorder gave."""

    def buffer(self, like: Tensor) -> Tensor:
        return like.clone()

    def record(self, run: Callable[[], list[Tensor]]) -> tuple[Recording, list[Tensor]]:
        out = [x.clone() for x in self.run(run)]
        self._given += out
        return _Again(self, run, out), out

    def run(self, fn: Callable[[], list[Tensor]]) -> list[Tensor]:
        """What `fn` returns, run as a graph would let it."""
        watch = _Watch() if self.refuse else None
        with watch or nullcontext(), self.outside(_unwatched(watch)) if self.outside else nullcontext():
            return fn()

    def spoil(self) -> None:
        """Rubbish into everything that was given so far."""
        for x in self._given:
            rubbish(x)


@dataclass(frozen=True)
class _Again:
    twin: Twin
    run: Callable[[], list[Tensor]]
    out: list[Tensor]

    @property
    def bytes(self) -> int:
        return sum(x.nbytes for x in self.out)

    def replay(self) -> None:
        fresh = self.twin.run(self.run)
        self.twin.spoil()
        for x, new in zip(self.out, fresh, strict=True):
            x.copy_(new)


def rubbish(x: Tensor) -> None:
    """Fills a tensor with what nobody takes for a result: NaN, or an integer near the largest."""
    if x.is_floating_point():
        x.fill_(torch.nan)
    elif x.dtype == torch.bool:
        x.logical_not_()
    else:
        x.fill_(torch.iinfo(x.dtype).max - 3)


_SYNCHRONIZING = ("local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")
"""Operators whose result Python, or the shape of a tensor, depends on: a graph cannot hold them."""


class _Watch(TorchDispatchMode):
    """Refuses what a graph cannot hold."""

    open = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name == "index" and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if self.open and (masks or name.lstrip("_").startswith(_SYNCHRONIZING)):
            raise GraphError(
                f"{func} waits for its result on the host, which a graph cannot",
                remedy="compute with tensors whose shapes do not depend on values",
            )
        return func(*args, **(kwargs or {}))


def _unwatched(watch: _Watch | None) -> Around:
    def around(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> Tensor:
        if watch is None:
            return fn(*args)
        watch.open = False
        try:
            return fn(*args)
        finally:
            watch.open = True

    return around
