"""A user's logits processors compiled, as layers are: traced once, kept on disk, called without guards.

What a function means is not its text: it may close over tensors, numbers and other functions. So it is traced at every
start, and the trace is what its artifact is known by. Tensors that it closes over become arguments of the artifact:
their values may be others tomorrow, or be written to by their owner today.

    fn(logits, history, length, arguments)  ->  artifact(logits, history, length, arguments, *what fn closes over)

A function that cannot be traced (it looks at a value) or whose artifact gives something else runs as it is, and that is
said.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fnengine import keys, processors
from fnengine.errors import ConfigError
from fnengine.graphs import compile
from fnengine.graphs.compile import CannotCompile, Traces, Wanted, make, trace, wanted
from fnengine.host.request import MAX_ARGUMENTS
from fnengine.processors import Own, check_own

log = logging.getLogger("fnengine")

_R, _S = 7, 11
"""Example sizes: distinct, and above 1, because 0 and 1 specialise."""
DYNAMIC: list[tuple[int, ...]] = [(0,), (0, 1), (0,), (0,)]
CLOSE = 1e-5
"""Of the largest finite logit: as far as a compiled function may be from what it was traced from. Its exponentials and
logarithms are other polynomials than torch's."""


@dataclass(frozen=True)
class Traced:
    """A processor, its artifact as it is wanted, and the tensors that it closes over."""

    own: Own
    wanted: Wanted | None
    constants: tuple[Tensor, ...] = ()
    why_not: str = ""
    """It could not be traced."""


def traced(own: Mapping[str, Own], vocab: int, device: torch.device) -> dict[str, Traced]:
    """Name -> the processor traced, with dynamic numbers of rows and of tokens so far. Nothing is compiled yet."""
    return {name: _traced(name, fn, vocab, device) for name, fn in own.items()}


def _traced(name: str, own: Own, vocab: int, device: torch.device) -> Traced:
    example = [
        torch.empty(_R, vocab, device="meta"),
        torch.empty(_R, _S, dtype=torch.int32, device="meta"),
        torch.empty(_R, dtype=torch.int32, device="meta"),
        torch.empty(_R, MAX_ARGUMENTS, device="meta"),
    ]
    try:
        here = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in example]
        graph, _ = trace(own, here, DYNAMIC, constants=True)
        constants = lift_constants(graph)
    except Exception as e:
        return Traced(own, None, why_not=f"it cannot be traced: {_place(e)}")
    shapes = [torch.empty_strided(c.shape, c.stride(), dtype=c.dtype, device=c.device) for c in constants]
    key = {"graph": graph.code, "source": _sources(), "vocab": str(vocab)}
    stem = "processor-" + re.sub(r"[^A-Za-z0-9]+", "-", name)[:40]
    asked = wanted(stem, graph, [*here, *shapes], [*DYNAMIC, *(() for _ in shapes)], device=device, key=key)
    return Traced(own, asked, constants)


def lift_constants(graph: torch.fx.GraphModule) -> tuple[Tensor, ...]:
    """The tensors that a traced function closes over, which become further arguments of the graph, in their order."""
    nodes = [n for n in graph.graph.nodes if n.op == "get_attr"]
    constants: dict[str, Tensor] = {}
    places: dict[str, torch.fx.Node] = {}
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    for node in nodes:
        name = str(node.target)
        if name not in constants:
            constants[name] = getattr(graph, name)
            with graph.graph.inserting_after(last):
                last = places[name] = graph.graph.placeholder(f"constant{len(places)}")
        node.replace_all_uses_with(places[name])
        graph.graph.erase_node(node)
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.lift_fresh_copy.default:  # of an argument it is a plain copy
            node.target = torch.ops.aten.clone.default
    graph.graph.lint()
    graph.recompile()
    return tuple(constants.values())


def compiled(
    given: Mapping[str, Traced], vocab: int, device: torch.device, folder: Path | None, traces: Traces
) -> tuple[dict[str, Own], dict[str, str]]:
    """(name -> what runs in the step, name -> how and why so)."""
    run: dict[str, Own] = {}
    how: dict[str, str] = {}
    for name, one in given.items():
        run[name], how[name] = one.own, one.why_not
        if one.wanted is not None:
            try:
                run[name], how[name] = _compiled(name, one, vocab, device, folder, traces), ""
            except CannotCompile as e:
                how[name] = str(e)
            except Exception as e:  # whatever Inductor makes of what a user wrote, the function itself is there
                log.debug("processor %r could not be compiled", name, exc_info=True)
                how[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"
        if how[name]:
            log.warning("processor %r runs uncompiled: %s", name, how[name])
    return run, {name: f"eager: {why}" if why else "compiled" for name, why in how.items()}


def _compiled(name: str, one: Traced, vocab: int, device: torch.device, folder: Path | None, traces: Traces) -> Own:
    assert one.wanted is not None
    artifact = make(one.wanted, folder, traces)

    def run(logits_RV: Tensor, history_RS: Tensor, length_R: Tensor, arguments_RJ: Tensor) -> Tensor:
        given = (logits_RV, history_RS, length_R, arguments_RJ)
        return artifact.call(*(x.contiguous() for x in given), *one.constants)

    # What a step relies on, of one row and of several, and then that it is the same function.
    check_own(name, run, vocab, device)
    for rows, tokens in ((1, 1), (2, 5), (3, 1), (5, 17)):
        given = processors.example(rows, tokens, vocab, device)
        if not alike(run(*given), one.own(*given)):
            raise ConfigError(f"compiled it gives other logits for {rows} rows", where=f"processor {name!r}")
    return run


def alike(got: Tensor, want: Tensor) -> bool:
    """Whether two results are one function's: the same tokens forbidden, and finite logits within `CLOSE`."""
    finite = want.isfinite()
    if got.shape != want.shape or not torch.equal(got[~finite], want[~finite]):
        return False
    scale = want[finite].abs().max().item() if finite.any() else 1.0
    return bool(((got - want)[finite].abs() <= CLOSE * max(scale, 1.0)).all())


def _place(error: Exception) -> str:
    """The error's first line, and the line outside of torch where it came up: the operation that does not trace."""
    root = str(Path(torch.__file__).parent)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(root)]
    outside = [f for f in frames if f.filename not in (__file__, compile.__file__)]
    lines = str(error).strip().splitlines()
    what = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return f"{what}, at `{outside[-1].line}` ({outside[-1].filename}:{outside[-1].lineno})" if outside else what


@cache
def _sources() -> keys.Key:
    return keys.of_files([Path(__file__), Path(compile.__file__ or "")])
