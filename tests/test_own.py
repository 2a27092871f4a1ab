"""A user's logits processors, compiled. Oracle: the functions themselves, as they are."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fnengine as fn
from fnengine import cli
from fnengine import own as owning
from fnengine.cli import own as named
from fnengine.cli import start
from fnengine.config import resolve
from fnengine.errors import ConfigError
from fnengine.graphs import compile as compiling
from fnengine.graphs.compile import Artifact, Traces, missing_compiler
from fnengine.host.request import Sampling
from fnengine.processors import Own, example
from tests.models import tiny_model
from tests.test_processors import OWN, count_up, halve
from tests.text_models import byte_tokenizer

needs_compiler = pytest.mark.skipif(missing_compiler() is not None, reason="no C++ compiler here")
CPU, V = torch.device("cpu"), 131
WEIGHT = torch.linspace(-1, 2, V)


def weighed(logits: torch.Tensor, history: torch.Tensor, length: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
    """Closes over a tensor, makes one, forbids tokens, and goes over the vocabulary twice."""
    x = (logits - args[:, :1] * WEIGHT).index_fill(1, torch.tensor([3, 5]), -torch.inf)
    entropy = -(x.softmax(1) * x.log_softmax(1).nan_to_num(neginf=0.0)).sum(1, keepdim=True)
    seen = torch.zeros_like(x).scatter_add(1, history.clamp(min=0).long(), (history >= 0).float())
    return torch.where(x.abs() < args[:, 1:2], x.tanh(), x) - entropy - seen / length[:, None]


def looks(logits: torch.Tensor, history: torch.Tensor, length: torch.Tensor, args: torch.Tensor) -> torch.Tensor:
    return logits * 2 if int(length.max()) > 1000 else logits


ALL: dict[str, Own] = {"weighed": weighed, "count up": count_up, "halve": halve, "looks": looks}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


def made(own: dict[str, Own], folder: Path | None) -> tuple[dict[str, Own], dict[str, str], Traces]:
    traces = Traces()
    run, how = owning.compiled(owning.traced(own, V, CPU), V, CPU, folder, traces)
    return run, how, traces


@pytest.fixture(scope="module")
def first(folder):
    return made(ALL, folder)


@needs_compiler
def test_compiled_functions_are_what_they_were(first, monkeypatch):
    """Bit for bit where nothing but sums and products of two is done; nothing is traced for another number of rows."""
    run, how, traces = first
    assert [how[name] for name in ("weighed", "count up", "halve")] == ["compiled"] * 3 and traces.compiled == 3
    monkeypatch.setattr(compiling, "trace", lambda *_a, **_k: pytest.fail("traced again"))
    for rows in (1, 2, 3, 32):
        for tokens in (1, 2, 40):
            given = example(rows, tokens, V, CPU)
            for name in ("count up", "halve"):
                assert torch.equal(run[name](*given), ALL[name](*given))
            got, want = run["weighed"](*given), weighed(*given)
            assert torch.equal(got.isinf(), want.isinf())
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert traces.compiled == 3


@needs_compiler
def test_arguments_may_lie_between_others(first):
    """Law: what counts are values, not strides. A step hands over a column of a wider array."""
    run, _, _ = first
    logits, history, length, args = example(3, 5, V, CPU)
    wide = torch.stack([args + 1, args, args - 1], 1)[:, 1]
    assert not wide.is_contiguous()
    assert torch.equal(run["count up"](logits, history, length, wide), count_up(logits, history, length, args))


@needs_compiler
def test_artifacts_are_kept_and_need_no_compiler_the_next_time(first, folder, monkeypatch):
    monkeypatch.setattr(compiling, "missing_compiler", lambda: "no C++ compiler found")
    run, how, traces = made({"weighed": weighed, "another name": count_up}, folder)
    assert (traces.compiled, traces.loaded) == (0, 1) and how["weighed"] == "compiled"
    assert how["another name"] == "eager: no C++ compiler found"
    given = example(2, 3, V, CPU)
    torch.testing.assert_close(run["weighed"](*given), weighed(*given), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_what_a_function_closes_over_may_change(first, folder):
    """The artifact is one of shapes: another tensor, or another value in the same one, is seen."""
    scale, given = torch.full((V,), 2.0), example(2, 3, V, CPU)

    def closes(weight: torch.Tensor) -> Own:
        return lambda logits, history, length, args: logits * weight

    run, _, traces = made({"scaled": closes(scale)}, folder)
    assert traces.compiled == 1 and torch.equal(run["scaled"](*given), given[0] * 2)
    scale.fill_(3.0)
    assert torch.equal(run["scaled"](*given), given[0] * 3)
    run, _, traces = made({"scaled": closes(torch.full((V,), 5.0))}, folder)
    assert (traces.compiled, traces.loaded) == (0, 1) and torch.equal(run["scaled"](*given), given[0] * 5)
    factor = 7.0  # a number is part of what is computed
    run, _, traces = made({"scaled": lambda logits, history, length, args: logits * factor}, folder)
    assert traces.compiled == 1 and torch.equal(run["scaled"](*given), given[0] * 7)


def test_a_function_that_looks_at_values_runs_as_it_is_and_says_where(caplog):
    with caplog.at_level(logging.WARNING, "fnengine"):
        run, how, _ = made({"looks": looks}, None)
    assert run["looks"] is looks
    assert "cannot be traced" in how["looks"] and "int(length.max()) > 1000" in how["looks"]
    assert f"test_own.py:{looks.__code__.co_firstlineno + 1}" in how["looks"]
    assert "processor 'looks' runs uncompiled" in caplog.text


def test_without_a_compiler_and_an_artifact_it_runs_as_it_is(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(compiling, "missing_compiler", lambda: "no C++ compiler found: apt install g++")
    with caplog.at_level(logging.WARNING, "fnengine"):
        run, how, traces = made({"halve": halve}, tmp_path)
    assert run["halve"] is halve and "apt install g++" in how["halve"] and "apt install g++" in caplog.text
    assert (traces.compiled, traces.loaded) == (0, 0)


@pytest.mark.parametrize(
    ("mutant", "said"),
    [
        (lambda x: x * 1.001, "gives other logits"),
        (lambda x: torch.where(x > 2, -torch.inf, x), "gives other logits"),
        (lambda x: x - x.mean(0), "among others"),
    ],
)
def test_an_artifact_that_is_another_function_is_not_taken(monkeypatch, mutant, said):
    """Mutants: a factor, tokens forbidden, rows that know each other."""
    wrong = Artifact(lambda logits, *_: mutant(logits * 0.5), "compiled", 0.0, "", False)
    monkeypatch.setattr(owning, "make", lambda *_: wrong)
    run, how, _ = made({"halve": halve}, None)
    assert run["halve"] is halve and said in how["halve"]


@needs_compiler
def test_compiled_functions_in_a_step():
    """Oracle: the engine that runs everything as it is."""
    sizes: dict[str, Any] = dict(max_num_seqs=4, max_model_len=64, kv_cache_memory_bytes=1 << 20)
    how = Sampling(temperature=0, processors=(("count up", (1e4,)), ("halve", ())))
    tokens = []
    for eager in (False, True):
        engine = fn.Engine.build(
            tiny_model("qwen3", "float32"),
            tokenizer=byte_tokenizer(V),
            processors={**OWN, "looks": looks},
            enforce_eager=eager,
            **sizes,
        )
        assert engine.built is not None
        ways = [engine.built.own[name].split(":")[0] for name in ("count up", "halve", "looks")]
        assert ways == (["eager"] * 3 if eager else ["compiled", "compiled", "eager"])
        deltas: list[list[fn.Delta]] = [[], [], []]
        for i in range(3):  # one row, then three
            prompt = np.array([7, 9, 20 + i], np.int32)
            request = fn.Request(f"r{i}", prompt, how, fn.Stop(max_tokens=6, ignore_eos=True))
            engine.submit_to(request, deltas[i].append)
            engine.turn()
        before = engine.built.traces.compiled
        while engine.turn():
            pass
        assert engine.built.traces.compiled == before
        tokens.append([[t for d in of for t in d.tokens] for of in deltas])
    assert tokens[0] == tokens[1] == [list(range(21 + i, 27 + i)) for i in range(3)]


def test_functions_named_on_the_command_line(tmp_path, monkeypatch):
    """A served request asks for one by its name; the start says how it runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine_of_own.py").write_text(
        "import torch\n"
        "def short(l, h, n, a):\n    return torch.where(torch.arange(l.shape[1]) == a[:, :1], 1e4, l)\n"
        "class Old: ...\ndef other(): ...\n"
    )
    (tmp_path / "more_of_own.py").write_text("def short(l, h, n, a):\n    return -l\n")
    found = named.processors(["mine_of_own:short", "mine_of_own:other", "mine_of_own:short"])
    assert list(found) == ["short", "other"]
    words = ["serve", "--logits-processors", "mine_of_own:short", "--enforce-eager", "--max-model-len", "64"]
    model = dataclasses.replace(tiny_model("qwen3", "float32"))
    model.__dict__["tokenizer"] = byte_tokenizer(V)  # its cached property
    engine = start.build_engine(resolve(cli.parser().parse_args(words)), model)
    assert "processors: short (eager: --enforce-eager)" in start.facts(engine)
    deltas: list[fn.Delta] = []
    how, stop = Sampling(temperature=0, processors=(("short", (77.0,)),)), fn.Stop(max_tokens=3, ignore_eos=True)
    engine.submit_to(fn.Request("r", np.array([5, 6], np.int32), how, stop), deltas.append)
    while engine.turn():
        pass
    assert [t for d in deltas for t in d.tokens] == [77, 77, 77]
    for names, what in (
        (["mine_of_own:Old"], "is no function, it is a class"),
        (["mine_of_own.short"], "is not module:name"),
        (["mine_of_own:short", "more_of_own:short"], "two processors are called 'short'"),
    ):
        with pytest.raises(ConfigError, match=what) as e:
            named.processors(names)
        assert "--logits-processors" in str(e.value)
