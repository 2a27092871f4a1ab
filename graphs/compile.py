"""A pure function of tensors -> one compiled artifact, called without guards, kept on disk.

`torch.compile` re-checks its guards at every call; here the function is traced once over fake tensors with the dynamic
sizes named up front, handed to Inductor's standalone compiler, and the artifact is called directly. Nothing can
recompile: sizes that were not declared dynamic are asserted by the caller's own types (a step's shapes come from one
place), so a wrong one is a programmer's error, not a trace.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import shutil
import subprocess
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fnengine import keys
from fnengine.environment import cache_dir, processor
from fnengine.graphs import replay

log = logging.getLogger("fnengine")


@dataclass(frozen=True)
class Artifact:
    """A compiled function. Calling it costs its work and a thin Python wrapper."""

    call: Callable[..., Any]
    source: str
    """`compiled` or `loaded`."""
    seconds: float
    key: str
    hooked: bool
    """Whether its kernels and buffers go through the hooks that were given."""

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)


@dataclass
class Traces:
    """What was compiled and loaded since the process began, counted, so that a test can demand that nothing more is."""

    compiled: int = 0
    loaded: int = 0
    seconds: float = 0.0
    log: list[tuple[str, str, float]] = field(default_factory=list)
    """(name, source, seconds)"""


class CannotCompile(Exception):
    """An artifact is not kept whole, and nothing can be compiled here; the message says why, with the remedy."""


def missing_compiler() -> str | None:
    """Why nothing can be compiled on CPU here, with the remedy, or None."""
    import sysconfig

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return "no C++ compiler found: apt install g++ (everything runs eagerly until then)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "no Python headers found: apt install python3-dev (everything runs eagerly until then)"
    return None


def start_in_background() -> None:
    """Begins to import Inductor, where it can compile anything here: while a C++ build is waited for, say."""
    if missing_compiler() is None:
        threading.Thread(target=start, name="import of Inductor", daemon=True).start()


def start() -> None:
    """Imports Inductor now: seconds of Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Inductor's own deprecations are not the user's business
        from torch._inductor import compile_fx, standalone_compile  # noqa: F401


@dataclass(frozen=True)
class Wanted:
    """A function that is wanted compiled, and what its artifact is known by. Having one costs nothing yet."""

    name: str
    fn: Callable[..., Tensor]
    example: tuple[Tensor, ...]
    """Tensors of the right dtypes, on any device, `meta` too: no value is looked at. Equal dynamic sizes stand for the
    same symbol, so sizes that may differ must differ here, and none may be 0 or 1."""
    dynamic: tuple[tuple[int, ...], ...]
    """For each tensor the dims whose size may vary."""
    device: torch.device
    key: keys.Key

    @property
    def stem(self) -> str:
        """Of the files that hold the artifact."""
        return f"{self.name}-{keys.digest(self.key)}"

    def kept(self, folder: Path) -> str | None:
        """How the artifact would be loaded from a folder, or None: it would be compiled."""
        if (folder / f"{self.stem}.zip").exists():
            return "without a compiler"
        return "through Inductor" if (folder / f"{self.stem}.bin").exists() else None

    def bytes(self, folder: Path) -> int:
        """What the artifact's files take."""
        return sum(f.stat().st_size for f in folder.glob(f"{self.stem}.*"))


def environment_key(device: torch.device) -> keys.Key:
    """The part of every artifact's key that the machine and the versions give."""
    here = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cpu":
        isa = torch.backends.cpu.get_cpu_capability()
        return {**here, "device": "cpu", **processor(), "isa": isa, "threads": str(torch.get_num_threads())}
    card = {"device": torch.cuda.get_device_name(device), "index": str(device.index or 0)}  # generated code names it
    return {**here, **card, "machine": platform.machine()}


def wanted(
    name: str,
    fn: Callable[..., Tensor],
    example: Sequence[Tensor],
    dynamic: Sequence[tuple[int, ...]],
    *,
    device: torch.device,
    key: keys.Key,
    names: Sequence[str] = (),
) -> Wanted:
    """`fn(*tensors) -> tensor` with the whole key of its artifact.

    Args:
        key: what the function's meaning depends on beyond shapes and the machine.
        names: of the tensors, for the key; numbers where there are none.
    """
    shapes = {}
    for i, (x, dyn) in enumerate(zip(example, dynamic, strict=True)):
        sizes = ", ".join(f"s{s}" if d in dyn else str(s) for d, s in enumerate(x.shape))
        shapes[names[i] if names else str(i)] = f"{str(x.dtype).removeprefix('torch.')} [{sizes}]"
    assert len(shapes) == len(example), f"two tensors have one name: {names}"
    whole = {**environment_key(device), **key, "order": " ".join(shapes), "shapes": shapes}
    return Wanted(name, fn, tuple(example), tuple(dynamic), device, whole)


def compile_flat(
    fn: Callable[..., Tensor],
    example: Sequence[Tensor],
    dynamic: Sequence[tuple[int, ...]],
    *,
    name: str,
    key: keys.Key,
    folder: Path | None,
    traces: Traces,
) -> Artifact:
    """`fn(*tensors) -> tensor`, compiled, on the device of its examples; see `wanted` and `make`."""
    device = example[0].device
    return make(wanted(name, fn, example, dynamic, device=device, key=key), folder, traces)


def make(wanted: Wanted, folder: Path | None, traces: Traces, hooks: replay.Hooks | None = None) -> Artifact:
    """The artifact, loaded from `folder` (None for nowhere) or else compiled and kept there.

    Args:
        hooks: see `replay.Hooks`; an artifact that is not replayed has none, and says so by `hooked`.

    Raises:
        CannotCompile: it would have to be compiled, and cannot be.
    """
    t0 = time.perf_counter()
    path = None if folder is None else folder / f"{wanted.stem}.bin"
    replayed = path is not None and wanted.device.type == "cpu"  # elsewhere Inductor's own loader knows the kernels
    call, source = _replay(path, hooks) if path is not None and replayed else None, "loaded"
    hooked = call is not None and hooks is not None
    if call is None:
        if wanted.device.type == "cpu" and (why_not := missing_compiler()) is not None:
            raise CannotCompile(why_not)
        call, source = _through_inductor(wanted, path)
        if hooks is not None and path is not None and replayed and (again := _replay(path, hooks)) is not None:
            call, hooked = again, True  # as every later process will run it
    seconds = time.perf_counter() - t0
    if source == "compiled":
        traces.compiled += 1
    else:
        traces.loaded += 1
    traces.seconds += seconds
    traces.log.append((wanted.name, source, seconds))
    return Artifact(call, source, seconds, keys.digest(wanted.key), hooked)


def folder() -> Path:
    """Where artifacts are kept. It may be copied to another path: nothing in it depends on where it is."""
    return cache_dir() / "artifacts"


def kept(folder: Path) -> bool:
    """Whether artifacts that need no compiler are in a folder, so that this process may well do without one."""
    return any(folder.glob("*.zip"))


def _replay(path: Path, hooks: replay.Hooks | None) -> Callable[..., Any] | None:
    """What `_keep` kept of the artifact at `path`, if it did and it can be loaded."""
    file = path.with_suffix(".zip")
    if not file.exists():
        return None
    try:
        call = replay.load(file, hooks)
    except Exception as e:
        log.warning("%s could not be loaded (%s: %s); taking the long way", file.name, type(e).__name__, e)
        return None
    return lambda *args: call(list(args))[0]


def _keep(modules: list[Any], path: Path) -> None:
    """Keeps the function behind an artifact in a form that needs no compiler, where there is one such function."""
    ours = [m for m in modules if "Runner" in vars(m)]
    try:
        if len(ours) != 1:
            raise replay.NotReplayable(f"{len(ours)} functions were generated")
        replay.keep(ours[0], path.with_suffix(".zip"))
    except (replay.NotReplayable, OSError) as e:
        log.info("%s will be loaded through Inductor: %s", path.name, e)


def _through_inductor(wanted: Wanted, path: Path | None) -> tuple[Callable[..., Any], str]:
    """(the artifact, `compiled` or `loaded`)."""
    start()
    from torch._inductor.codecache import PyCodeCache

    call, source, before = None, "loaded", len(PyCodeCache.modules)
    with warnings.catch_warnings(), _inductor_options(), _flags_at_their_word():
        warnings.simplefilter("ignore")  # Inductor's own deprecations are not the user's business
        if path is not None and path.exists():
            call = _load(path)
        if call is None:
            source = "compiled"
            call = _compile(wanted, path)
        if path is not None and wanted.device.type == "cpu":
            _keep(PyCodeCache.modules[before:], path)
    return call, source


def _inductor_options() -> Any:
    """Inductor's settings while an artifact is made or loaded.

    Shapes are asserted by the caller.
    """
    from torch._inductor import config

    return config.patch({"size_asserts": False, "alignment_asserts": False, "cpp.vec_isa_ok": True})


@contextlib.contextmanager
def _flags_at_their_word() -> Iterator[None]:
    """Inductor's question whether instructions work here, answered by the processor's flags and by the compiler
    accepting its own, without the test programs that Inductor would build and run when the cache is cold (1.2 s).
    """
    from torch._inductor import cpu_vec_isa
    from torch._inductor.cpp_builder import get_cpp_compiler

    def check_build(isa: Any, code: str) -> bool:
        flags = isa.build_arch_flags().split()
        run = subprocess.run([get_cpp_compiler(), *flags, "-E", "-x", "c++", "/dev/null"], capture_output=True)
        return run.returncode == 0

    known = "check_build" in vars(cpu_vec_isa.VecISA)
    with mock.patch.object(cpu_vec_isa.VecISA, "check_build", check_build) if known else contextlib.nullcontext():
        yield


def _load(path: Path) -> Callable[..., Any] | None:
    from torch._inductor import CompiledArtifact  # type: ignore[attr-defined]

    try:
        artifact = CompiledArtifact.load(path=str(path), format="binary")
    except Exception as e:
        log.warning(
            "compiled artifact %s could not be loaded (%s: %s); compiling again", path.name, type(e).__name__, e
        )
        return None
    return _only(artifact)


def _compile(wanted: Wanted, path: Path | None) -> Callable[..., Any]:
    from torch._guards import TracingContext, tracing
    from torch._inductor import standalone_compile  # type: ignore[attr-defined]

    graph, fakes = trace(wanted.fn, [_on(wanted.device, x) for x in wanted.example], wanted.dynamic)
    # The symbols are this mode's. "from_graph" would not find it in a graph of make_fx and make another one, and some
    # versions refuse a graph of two modes.
    mode = fakes[0].fake_mode  # type: ignore[attr-defined]
    with tracing(TracingContext(mode)):
        artifact = standalone_compile(graph, fakes, dynamic_shapes="from_tracing_context")  # pyright: ignore[reportArgumentType]
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            artifact.save(path=str(path), format="binary")
            path.with_suffix(".json").write_text(keys.text(wanted.key))
        except Exception as e:
            log.warning("compiled artifact %s could not be kept (%s: %s)", path.name, type(e).__name__, e)
    return _only(artifact)


def _on(device: torch.device, x: Tensor) -> Tensor:
    """An example on the device that the function is for. Nothing writes to what is made here, so on CPU it takes
    addresses and no memory."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) if x.is_meta else x


def _only(artifact: Any) -> Callable[..., Any]:
    """The artifact as a function returning its one output."""

    def call(*args: Any) -> Any:
        out = artifact(*args)
        return out[0] if isinstance(out, (list, tuple)) else out

    return call


def trace(
    fn: Callable[..., Tensor],
    example: Sequence[Tensor],
    dynamic: Sequence[tuple[int, ...]],
    *,
    constants: bool = False,
) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    """The aten graph of `fn` over fake tensors whose dynamic dims are symbols; equal sizes share one.

    Args:
        constants: whether `fn` may use tensors that it was not given; they are attributes of the graph.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=True), allow_non_fake_inputs=constants)
    fakes = []
    for x, dyn in zip(example, dynamic, strict=True):
        sizes = [DimDynamic.DUCK if d in dyn else DimDynamic.STATIC for d in range(x.dim())]
        fakes.append(mode.from_tensor(x, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes)))
    with torch.no_grad(), mode:
        graph = make_fx(fn, tracing_mode="real", _allow_non_fake_inputs=constants)(*fakes)
    for i, (x, dyn) in enumerate(zip(fakes, dynamic, strict=True)):
        for d in dyn:  # there are no guards, so an artifact for the example's size would be called with any other
            if isinstance(x.shape[d], int) or x.shape[d].node.maybe_as_int() is not None:
                raise CannotCompile(f"size {d} of input {i} of a layer is taken for a constant")
    return graph, fakes
