"""Buckets, and artifacts that are traced once, kept and found again. Oracle: the eager function."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from fnengine.graphs import compile as compiling
from fnengine.graphs.bucket import LEAST, fit
from fnengine.graphs.compile import Traces, compile_flat, trace

needs_compiler = pytest.mark.skipif(compiling.missing_compiler() is not None, reason="no C++ compiler here")


def scaled(x, table, weight):
    """A small function with a dynamic size in two arguments and a mutation in one."""
    table[: x.shape[0]] += 1
    return (x * weight).sum(-1, keepdim=True) + x


def example():
    return [torch.randn(7, 8), torch.zeros(11, 8), torch.randn(8)]


DYNAMIC = [(0,), (0,), ()]


def test_the_ladder_by_hand():
    shapes = {(1, 1): (2, 2), (2, 1): (2, 2), (3, 2): (3, 2), (9, 2): (9, 2), (32, 32): (32, 32), (33, 33): (40, 40)}
    shapes |= {(64, 64): (64, 64), (129, 1): (160, 2), (512, 64): (512, 64)}
    for (tokens, rows), expected in shapes.items():
        b = fit(tokens, rows)
        assert (b.tokens, b.rows) == expected


def test_laws_of_the_ladder():
    for t in range(1, 600):
        for r in {1, t // 2 + 1, t}:
            b = fit(t, r)
            assert b.tokens >= max(t, LEAST) and b.rows >= max(r, LEAST)
            assert b.tokens == t or b.rows > r, "padding tokens need a padding row to own them"
            assert b.tokens <= max(LEAST, 1.25 * t), "no more than a quarter is padding"
    assert len({fit(t, 1).tokens for t in range(1, 513)}) == 55, "sizes that a budget of 512 can meet"


def test_a_trace_has_symbols_only_where_they_were_declared():
    graph, fakes = trace(scaled, example(), DYNAMIC)
    sizes = [[isinstance(s, torch.SymInt) for s in f.shape] for f in fakes]
    assert sizes == [[True, False], [True, False], [False]]
    assert str(fakes[0].shape[0]) != str(fakes[1].shape[0])
    assert len([n for n in graph.graph.nodes if n.op == "placeholder"]) == 3


@needs_compiler
def test_compiled_kept_and_loaded(tmp_path):
    traces, args = Traces(), dict(name="f", key={"of": "a"}, folder=tmp_path)
    first = compile_flat(scaled, example(), DYNAMIC, traces=traces, **args)
    assert (first.source, traces.compiled) == ("compiled", 1)
    for rows in (2, 3, 9):
        x, t, w = torch.randn(rows, 8), torch.zeros(20, 8), torch.randn(8)
        t2, at = t.clone(), t.data_ptr()
        torch.testing.assert_close(first(x, t, w), scaled(x, t2, w))
        assert torch.equal(t, t2) and t.data_ptr() == at, "the argument is written in place"
    again = compile_flat(scaled, example(), DYNAMIC, traces=traces, **args)
    assert (again.source, again.key, traces.compiled, traces.loaded) == ("loaded", first.key, 1, 1)
    x, w = torch.randn(5, 8), torch.randn(8)
    torch.testing.assert_close(again(x, torch.zeros(9, 8), w), scaled(x, torch.zeros(9, 8), w))

    other = compile_flat(scaled, example(), DYNAMIC, traces=traces, **{**args, "key": {"of": "b"}})
    assert other.source == "compiled" and other.key != first.key

    kept = [p for p in tmp_path.iterdir() if first.key in p.name]
    assert {p.suffix for p in kept} == {".bin", ".zip", ".json"}
    for p in kept:
        p.write_bytes(b"garbage")
    mended = compile_flat(scaled, example(), DYNAMIC, traces=traces, **args)
    assert mended.source == "compiled", "a damaged artifact is made again, not trusted"


def test_without_a_compiler_the_reason_names_the_remedy(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    assert "apt install g++" in (compiling.missing_compiler() or "")


def test_without_a_compiler_the_engine_is_eager_and_says_so(monkeypatch, tmp_path):
    from fnengine import build as building
    from fnengine.settings import Settings
    from tests.models import tiny_model

    for module in (building, compiling):
        monkeypatch.setattr(module, "missing_compiler", lambda: "no C++ compiler found: apt install g++")
    monkeypatch.setattr(building, "folder", lambda: tmp_path)  # a kept artifact would do
    built = building.build(tiny_model("qwen3", "float32"), Settings(max_model_len=32, max_num_seqs=2))
    assert built.execution.startswith("eager") and "apt install g++" in built.execution
    assert dataclasses.is_dataclass(built)
