"""The suite for a GPU, without one: what it keeps, what it refuses, its arithmetic and its table by hand-worked
examples, and the whole of it in miniature (slow)."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_check, gpu_load, gpu_peers, machine
from benchmarks.gpu_results import Book, NotMeasured, Sizes, tables, verdict
from fnengine import checkpoint, params
from fnengine.errors import SpecError
from fnengine.graphs.bucket import Bucket
from fnengine.graphs.dispatch import FULL, Choice, Key
from fnengine.host.step import Ask
from fnengine.kernels import attention, reference
from fnengine.kernels.checking import disagreement

ROOT = Path(__file__).parent.parent
FACTS = {"commit": "c1", "card": "a card", "date": "2026-11-21T00:00:00", "driver": "1", "versions": {"torch": "2"}}


def book(folder: Path, stage: str = "decode", model: str | None = "m", **more) -> Book:
    again = {k: more.pop(k) for k in ("again", "seconds") if k in more}
    return Book(folder, stage, model, {**FACTS, **more}, **again)


# ---- what is kept -------------------------------------------------------------------------------------------------


def test_a_measurement_stands_for_its_commit_card_and_parameters(tmp_path):
    ran = []

    def run(value: dict | None = None):
        ran.append(1)
        return {"x": len(ran)} if value is None else value

    assert book(tmp_path).measure("one", {"rows": (1, 2)}, run) == {"x": 1}
    assert book(tmp_path).measure("one", {"rows": (1, 2)}, run) == {"x": 1}, "it was measured again"
    for other in ({"commit": "c2"}, {"card": "another"}, {"again": True}):
        before = len(ran)
        book(tmp_path, **other).measure("one", {"rows": (1, 2)}, run)
        assert len(ran) == before + 1, other
    book(tmp_path).measure("one", {"rows": (1, 3)}, run)
    book(tmp_path).measure("two", {"rows": (1, 2)}, run)
    assert len(ran) == 6
    # a new commit takes the old one's place; another card, other parameters and another name have places of their own
    assert len(book(tmp_path).entries) == 4


@pytest.mark.parametrize("outcome", [ValueError("no"), NotMeasured("not here"), {"right": False}, {"unfinished": True}])
def test_what_came_to_no_good_end_is_measured_again(tmp_path, outcome):
    def run():
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    first = book(tmp_path)
    first.measure("one", {}, run)
    assert first.failed == ([] if isinstance(outcome, NotMeasured) or "unfinished" in str(outcome) else ["one"])
    again = book(tmp_path)
    assert again.measure("one", {}, lambda: {"x": 1}) == {"x": 1} and not again.failed
    assert [e["value"] for e in book(tmp_path).entries] == [{"x": 1}]


def test_the_file_is_whole_after_every_measurement(tmp_path):
    b = book(tmp_path)
    b.measure("one", {}, lambda: {"x": 1})
    b.measure("two", {}, lambda: 1 / 0)  # type: ignore[arg-type]
    body = json.loads((tmp_path / "decode-m.json").read_text())
    assert [e["name"] for e in body["measurements"]] == ["one", "two"]
    assert body["measurements"][1]["error"].startswith("ZeroDivisionError") and "1 / 0" in str(body)
    assert body["facts"] == FACTS and [p.name for p in tmp_path.iterdir()] == ["decode-m.json"]


def test_nothing_is_begun_when_the_time_is_over(tmp_path):
    b = book(tmp_path, "check", None, seconds=-1.0)
    assert b.measure("one", {}, lambda: {"right": True}) is None and b.left == ["one"] and not b.failed
    book(tmp_path, "check", None).measure("two", {}, lambda: {"right": True})
    late = book(tmp_path, "check", None, seconds=-1.0)
    assert late.measure("two", {}, lambda: {}) == {"right": True}, "what is known needs no time"
    late.measure("one", {}, lambda: {})
    assert verdict(tmp_path, "c1", "a card") == "unfinished: one"


# ---- refusal ------------------------------------------------------------------------------------------------------


def test_the_verdict_is_that_of_this_commit_on_this_card(tmp_path):
    assert verdict(tmp_path, "c1", "a card") == "not run"
    b = book(tmp_path, "check", None)
    b.measure("kernels", {}, lambda: {"right": True})
    b.measure("elsewhere", {}, lambda: _raise(NotMeasured("not on this card")))
    assert verdict(tmp_path, "c1", "a card") == "passed"
    b.measure("tokens", {}, lambda: {"right": False})
    b.measure("graphs", {}, lambda: _raise(RuntimeError("broken")))
    assert verdict(tmp_path, "c1", "a card") == "failed: tokens, graphs"
    assert verdict(tmp_path, "c2", "a card") == verdict(tmp_path, "c1", "another") == "not run"


def _raise(e: Exception):
    raise e


@pytest.fixture
def inside(tmp_path, monkeypatch):
    """Runs decode of a model as the suite's process would, with a stage that only takes notes."""
    ran = []
    monkeypatch.setitem(gpu.OF_A_MODEL, "decode", lambda b, s: ran.append(b.facts["checked"]))
    monkeypatch.setattr(gpu, "session", lambda *_: None)

    def run(right: bool, *more: str) -> tuple[int, list[str]]:
        b = book(tmp_path, "check", None, card=machine.cpu_name(), again=True)
        b.measure("tokens", {}, lambda: {"right": right})
        argv = ["--stage", "decode", "--model", "qwen3-0.6b", "--device", "cpu", "--divide", "16", "--commit", "c1"]
        args = gpu.arguments([*argv, "--out", str(tmp_path), *more])
        args.model = "qwen3-0.6b"
        return gpu.inside(args), ran

    return run


def test_nothing_is_measured_after_a_failed_check(inside, tmp_path):
    assert inside(False) == (gpu.REFUSED, []) and not (tmp_path / "decode-qwen3-0.6b.json").exists()
    assert inside(False, "--unchecked") == (0, ["failed: tokens"])
    assert inside(True) == (0, ["failed: tokens", "passed"])


def test_a_model_that_the_engine_does_not_know_is_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "rates", lambda *_: {"read": 1.0, "matmul": 1.0})
    monkeypatch.setenv("FNENGINE_CACHE", str(tmp_path / "cache"))
    argv = ["--stage", "decode", "--model", "mixtral-8x7b", "--device", "cpu", "--divide", "16", "--commit", "c1"]
    args = gpu.arguments([*argv, "--out", str(tmp_path)])
    args.model = "mixtral-8x7b"

    def unknown(_folder):
        raise SpecError("no family knows MixtralForCausalLM")

    monkeypatch.setattr(checkpoint, "read_spec", unknown)
    assert gpu.inside(args) == 0
    assert "left out: not supported yet" in tables(tmp_path) and "MixtralForCausalLM" in tables(tmp_path)


def test_everything_runs_in_order(monkeypatch):
    names = gpu_load.models()
    assert names == ["qwen3-0.6b", "llama-3.1-8b", "qwen3-32b", "mixtral-8x7b"]
    groups = gpu.groups(["check", "rates", "decode", "mixed", "start", "peers"], names[:2])
    assert groups[:2] == [(("check",), None), (("rates",), None)]
    assert groups[2:5] == [(("decode", "mixed"), names[0]), (("start",), names[0]), (("peers",), names[0])]
    assert groups[5][1] == names[1] and len(groups) == 8


def test_a_process_that_takes_too_long_is_ended(capfd):
    assert gpu.child([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) == gpu.FAILED
    assert "ended after" in capfd.readouterr().out
    assert gpu.child([sys.executable, "-c", "raise SystemExit(2)"], 60) == 2


def test_the_commit_is_said_where_git_is_not(tmp_path, monkeypatch):
    (tmp_path / "C").write_text("abc\nmore\n")
    assert gpu.commit_of(str(tmp_path / "C")) == "abc" and gpu.commit_of("def") == "def"
    for folder in gpu.SOURCES:
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine, "commit", lambda: "unknown")
    first = gpu.commit_of(None)
    (tmp_path / "kernels" / "new.py").write_text("x = 1\n")
    assert first.startswith("unknown+") and gpu.commit_of(None) not in (first, "unknown")
    (tmp_path / "COMMIT").write_text("123\n")
    assert gpu.commit_of(None) == "123"


def test_tuning_is_counted_and_goes_on_in_the_next_run(tmp_path, monkeypatch):
    """Oracle: by hand. Of two shapes one is not the default's; when the time is over the second is left."""
    from fnengine.cli import tune_kernels
    from fnengine.kernels import triton

    def measure(*given):
        assert given[-2:] == ("none", tmp_path / "tuned")
        for knobs, best in (({"stages": 2}, 0.8), ({}, 1.0)):
            yield {"op": "o", "shape": "s", "new": True, "knobs": knobs, "best": best, "out": {}, "file": "/x/o-1.json"}

    monkeypatch.setattr(tune_kernels, "measure", measure)
    monkeypatch.setattr(checkpoint, "read_spec", lambda _folder: None)
    monkeypatch.setattr(triton, "installed", lambda: True)
    session: Any = SimpleNamespace(device="cuda", dtype="bfloat16", folder=tmp_path)
    value = gpu.tuned(session, "none", book(tmp_path, "tune"))
    assert {k: value[k] for k in ("shapes", "changed", "best", "files")} == {
        "shapes": 2,
        "changed": 1,
        "best": 0.8,
        "files": ["o-1.json"],
    }
    assert "unfinished" not in value
    late = gpu.tuned(session, "none", book(tmp_path, "tune", seconds=-1.0))
    assert (late["shapes"], late["unfinished"]) == (1, True)
    with pytest.raises(NotMeasured):
        session.device = "cpu"
        gpu.tuned(session, "none", book(tmp_path, "tune"))
    b = book(tmp_path, "tune")
    b.measure("none", {}, lambda: value)
    assert "| m | none | 2 | 1 | 0.80 |" in " ".join(tables(tmp_path).split())


# ---- arithmetic ---------------------------------------------------------------------------------------------------


def test_the_idle_share_counts_what_overlaps_once():
    """Two kernels side by side from 1 to 3.5, one from 4.5 to 5: 3 of 4 seconds, by hand."""
    share = gpu_load.idle_of([("b", 2.0, 3.5), ("a", 1.0, 3.0), ("c", 4.5, 5.0), ("d", 2.5, 2.75)], 2)
    assert share["idle"] == 0.25 and share["busy_seconds_a_step"] == 1.5 and share["wall_seconds_a_step"] == 2.0
    assert share["kernel_seconds_a_step"] == (2 + 1.5 + 0.5 + 0.25) / 2 and share["kernels_a_step"] == 2
    with pytest.raises(NotMeasured):
        gpu_load.idle_of([], 2)


def test_steps_are_counted_by_what_became_of_them():
    """Oracle: by hand. Four tokens of eight are padding for 1 s, none of two for 1 s, and one step is eager for 2 s."""
    key = Key(FULL, Bucket(8, 4), Ask())
    choices = [
        Choice(4, 3, Bucket(8, 4), Ask(), key, relaxed=True),
        Choice(2, 2, Bucket(2, 2), Ask(), key),
        Choice(100, 3, Bucket(104, 4), Ask(), why="beyond the ladder"),
    ]
    steps = [(10.0, None), *((t, SimpleNamespace(tokens=n)) for t, n in ((11.0, 4), (12.0, 2), (14.0, 100)))]
    facts = gpu_load.graph_facts(choices, steps)
    assert (facts["hits"], facts["relaxed"], facts["fallbacks"]) == (2, 1, 1)
    assert facts["why"] == {"beyond the ladder": 1}
    assert facts["padding_tokens"] == 4 / 110 and facts["padding_time"] == 0.5 / 4 and facts["seconds_eager"] == 2
    assert facts["buckets"]["8x4"] == {"steps": 1, "tokens": 4, "padding": 4, "seconds": 1.0}
    assert gpu_load.graph_facts([])["fallbacks"] == "nothing is captured"
    with pytest.raises(AssertionError, match="another order"):
        gpu_load.graph_facts(choices[::-1], steps)


def test_requests_arrive_at_the_rate_asked_for():
    """Law: the number of a Poisson process's arrivals is within five deviations of its mean."""
    times = gpu_load.arrivals(50.0, 40.0)
    assert abs(len(times) - 2000) < 5 * 2000**0.5 and all(a < b for a, b in itertools.pairwise(times))
    assert times[-1] < 40 and len(gpu_load.arrivals(1e-3, 0.1)) == 2


@pytest.mark.parametrize("name, billions", [("qwen3-0.6b", 0.596), ("llama-3.1-8b", 8.03), ("qwen3-32b", 32.76)])
def test_the_configs_are_models_of_their_sizes(name, billions):
    """Oracle: the parameter counts that their makers publish."""
    assert params.count(checkpoint.read_spec(gpu_load.CONFIGS / name)) == pytest.approx(billions * 1e9, rel=1e-3)


@pytest.mark.parametrize("name", ["qwen3-0.6b", "llama-3.1-8b", "qwen3-32b"])
def test_a_miniature_is_of_the_same_family(tmp_path, name):
    small = checkpoint.read_spec(gpu_load.miniature(name, 16, tmp_path))
    whole = checkpoint.read_spec(gpu_load.CONFIGS / name)
    assert (small.family, small.tied) == (whole.family, whole.tied) and params.count(small) < 2e7
    assert small.layers[0].mixer.heads % small.layers[0].mixer.kv_heads == 0


# ---- the table ----------------------------------------------------------------------------------------------------


def test_the_table_has_what_was_measured_and_what_was_not(tmp_path):
    step = {"rows": 64, "context": 1024.0, "step_seconds": 0.0042, "tokens_per_second": 15238.0}
    step |= {"achieved_read": 3.4e12, "of_read": 0.791, "of_floor": 0.802, "device": {"idle": 0.0215}}
    step |= {"graphs": {"hits": 64, "fallbacks": 0}}
    b = book(tmp_path)
    b.measure("64 rows", {}, lambda: step)
    b.measure("256 rows", {}, lambda: _raise(RuntimeError("out | of memory")))
    late = book(tmp_path, "prefill", seconds=-1.0)
    late.measure("2048 tokens", {}, dict)
    checks = book(tmp_path, "check", None)
    checks.measure("linear cpu float32", {"seeds": [0]}, lambda: {"right": True, "says": "as the reference"})
    checks.measure("linear torch float32", {"seeds": [0]}, lambda: _raise(NotMeasured("for GPUs")))
    checks.measure("linear triton float32", {"seeds": [0]}, lambda: {"right": False, "says": "far off"})
    text = tables(tmp_path)
    line = next(x for x in text.splitlines() if "64 rows" in x)
    cells = [c.strip() for c in line.strip("|").split("|")]
    assert cells == ["m", "64 rows", "64", "1024", "4.200", "15238", "3400", "79.1", "80.2", "2.1", "64", "0"]
    assert "- **failed**: RuntimeError: out | of memory (m 256 rows)" in text
    assert "- left for want of time: m: 2048 tokens" in text
    assert "1 of 3 backends" in text and "| NO " in text and "left out: for GPUs (linear torch float32)" in text
    assert "- a card, commit c1" in text and "torch 2" in text
    (tmp_path / "another.json").write_text("[1]")
    assert tables(tmp_path) == text


# ---- checks -------------------------------------------------------------------------------------------------------


def test_a_backend_that_breaks_its_contract_is_caught():
    """Mutants: a wrong product, one in another dtype, one that writes to what it reads, and a copy that is
    not made."""
    right = reference.linear.fn

    def off(*args):
        return right(*args) * 1.01

    def double(*args):
        return right(*args).double()

    def writes(x, *args):
        out = right(x, *args)
        x.add_(1)
        return out

    f32 = torch.float32
    assert disagreement(reference.linear, f32) is None
    assert "not close" in (disagreement(reference.linear, f32, fn=off) or "")
    assert "gives torch.float64" in (disagreement(reference.linear, f32, fn=double) or "")
    assert "was written" in (disagreement(reference.linear, f32, fn=writes) or "")
    assert "pools" in (disagreement(reference.copy_blocks, f32, fn=lambda pools, pairs: None) or "")
    assert disagreement(reference.copy_blocks, f32) is None


def test_a_slice_stays_one_on_its_way_to_the_backend():
    """Backends must cope with strides; a check that made everything contiguous would not see it."""
    seen = []

    def fn(*args):
        seen.extend(not x.is_contiguous() for x in args if isinstance(x, torch.Tensor))
        return attention.paged_attention(*args)

    wanted = [
        not x.is_contiguous()
        for seed in (0, 1)
        for e in attention.PAGED_ATTENTION.examples(torch.float32, seed)
        for x in e.values()
        if isinstance(x, torch.Tensor)
    ]
    assert disagreement(reference.paged_attention, torch.float32, fn=fn) is None and seen == wanted


def test_other_tokens_from_a_graph_are_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "CAPTURED", ("FULL",))
    sizes, found = Sizes(check_rows=4, check_requests=5), []
    whole = gpu_check.tokens_of

    def mutant(engine, wanted):
        out = whole(engine, wanted)
        if engine.built.device.graphs is not None and len(found) == 1:
            out[2][-1] ^= 1
        return out

    monkeypatch.setattr(gpu_check, "tokens_of", mutant)
    with gpu_check.tiny("qwen3") as folder:
        for _ in range(2):
            b = book(tmp_path, "check", None, again=True)
            gpu_check.steps(b, "qwen3", folder, "cpu", sizes)
            found.append(b.entries[0])
    assert found[0]["value"]["right"], found[0]
    assert not found[1]["value"]["right"] and found[1]["value"]["differ"] == [2]


@pytest.mark.gpu
def test_dummy_weights_do_not_depend_on_where_they_lie():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    info = params.ArrayInfo((1500, 1001), (("w", 1500),), 0.02)
    arrays = [
        params.dummy_array("a.b", info, torch.bfloat16, params.noise(0), torch.device(d)) for d in ("cpu", "cuda")
    ]
    assert torch.equal(arrays[0], arrays[1].cpu())


# ---- what only a card does, with its answers made up ----------------------------------------------------------------


def seen(name: str, begin: float, end: float, **more) -> SimpleNamespace:
    """An event of torch's profiler, in microseconds."""
    from torch.autograd import DeviceType

    span = SimpleNamespace(start=begin, end=end)
    return SimpleNamespace(**{"name": name, "time_range": span, "device_type": DeviceType.CUDA, **more})


def profiled() -> SimpleNamespace:
    """Two steps: a matmul of 30 us and attention of 10 us in each, with gaps of 10 us; and what must not count."""
    from torch.autograd import DeviceType

    events = [seen("matmul", t, t + 30) for t in (0, 60)] + [seen("attention", t, t + 10) for t in (40, 100)]
    events += [seen("a range", 0, 500, is_user_annotation=True), seen("launch", 0, 300, device_type=DeviceType.CPU)]
    return SimpleNamespace(events=lambda: events)


def test_only_what_ran_on_the_device_counts(monkeypatch):
    """Oracle: by hand. 80 of 110 us are covered; the profile that warms the profiler up is not the one that counts."""
    monkeypatch.setattr(gpu_load, "profile", lambda _device, run: (run(), profiled())[1])
    steps = []
    s = SimpleNamespace(device="cuda", sizes=SimpleNamespace(profiled=2), about=dict)
    share = gpu_load._device_share(s, SimpleNamespace(step=lambda: steps.append(1)))  # type: ignore[arg-type]
    assert len(steps) == 4 and share["idle"] == pytest.approx(30 / 110) and share["kernels_a_step"] == 2
    assert share["busy_seconds_a_step"] == pytest.approx(40e-6)
    top = gpu_load.top_kernels(s, profiled(), 2)  # type: ignore[arg-type]
    assert [k["name"] for k in top["kernels"]] == ["matmul", "attention"]
    assert top["kernels"][0]["share"] == pytest.approx(0.75) and top["kernels"][0]["calls_a_step"] == 1
    assert top["device_seconds"] == pytest.approx(40e-6)


def test_the_driver_is_asked_and_may_be_silent(tmp_path, monkeypatch):
    command = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.smi("driver_version") == {}
    command.write_text("#!/bin/sh\necho '580.1, 1980'\n")
    command.chmod(0o755)
    assert gpu.smi("driver_version,clocks.sm") == {"driver_version": "580.1", "clocks.sm": "1980"}
    assert gpu.smi("driver_version") == {}, "another number of values than asked for"
    command.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.smi("driver_version") == {}


class Clock:
    """Stands for torch.cuda.Event: every record is 2 ms after the one before."""

    now = 0.0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None:
        Clock.now += 2.0
        self.at = Clock.now

    def elapsed_time(self, other: Clock) -> float:
        return other.at - self.at


def test_a_card_is_timed_by_its_own_clock_and_named(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waited.append(1))
    ran: list[int] = []
    assert gpu.times(ran.append, "cuda", repeats=4) == [0.002] * 4 and len(ran) == 7 and len(waited) == 2
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(gpu, "smi", lambda query: {"driver_version": "580.1"} if query == "driver_version" else {})
    args = SimpleNamespace(device="cuda", commit="c1", divide=1)
    f = json.loads(json.dumps(gpu.facts(args, "a command")))  # type: ignore[arg-type]
    assert (f["card"], f["driver"], f["capability"], f["commit"]) == ("NVIDIA H200", "580.1", [9, 0], "c1")
    assert f["versions"]["torch"] == torch.__version__ and f["command"] == "a command" and "CUDA" in f["versions"]


def test_a_card_is_started_cold_and_warm(tmp_path, monkeypatch):
    """In one folder of its own, empty the first time; a resumed warm start fills the caches before."""
    calls = []

    def run(command, env, **_more):
        folder = Path(env["FNENGINE_CACHE"])
        calls.append("warm" if (folder / "filled").exists() else "cold")
        (folder / "filled").write_text("")
        return SimpleNamespace(returncode=0, stdout='noise\n{"first_token": 1.5}\n', stderr="")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    s = SimpleNamespace(device="cuda", folder=tmp_path, dtype="bfloat16", name="m")
    gpu.start(b := book(tmp_path, "start", divided_by=1), s)  # type: ignore[arg-type]
    assert [(e["name"], e["value"]) for e in b.entries] == [(n, {"first_token": 1.5}) for n in ("cold", "warm")]
    assert calls[0] == "cold" and calls[1:] == ["warm", "warm"]
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1, stdout="", stderr="why"))
    gpu.start(b := book(tmp_path, "start", divided_by=1, again=True), s)  # type: ignore[arg-type]
    assert b.failed == ["cold", "warm"] and "why" in b.entries[0]["error"]


def test_a_peer_that_never_answers_is_given_up():
    slow = gpu_peers.limited(lambda _prompts, _new: time.sleep(30) or [], 0.05)
    with pytest.raises(RuntimeError, match="nothing came back"):
        slow([[1]], 1)
    assert gpu_peers.limited(lambda prompts, new: [[new]] * len(prompts), 60)([[1], [2]], 3) == [[3], [3]]
    with pytest.raises(ZeroDivisionError):
        gpu_peers.limited(lambda _prompts, new: [[1 // 0]], 60)([[1]], 3)


# ---- all of it ----------------------------------------------------------------------------------------------------

BLOCKED = """
import sys
for name in ("fastapi", "uvicorn", "httptools", "pydantic", "prometheus_client"):
    sys.modules[name] = None
"""


@pytest.mark.slow
def test_the_whole_suite_in_miniature(tmp_path):
    """As on a machine without the server's dependencies; then once more, which measures nothing."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "sitecustomize.py").write_text(BLOCKED)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "path"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--divide", "16", "--commit", "c1"]
    command += ["--model", "qwen3-0.6b,llama-3.1-8b,mixtral-8x7b", "--out", str(tmp_path / "out")]
    first, second = (
        subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500) for _ in range(2)
    )
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text in first.stdout and "failed" not in text and "checks before measuring: passed" in text
    for stage in ("check", "rates", *(f"{s}-qwen3-0.6b" for s in gpu.OF_A_MODEL if s != "tune")):
        body = json.loads((tmp_path / "out" / f"{stage}.json").read_text())
        assert any("value" in e for e in body["measurements"]), stage
    assert second.returncode == 0
    done = [x for x in second.stdout.splitlines() if ": done in" in x]
    assert not done, done
