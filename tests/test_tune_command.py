"""`fnengine tune`, `graphs show` and what they measure with. Oracles: a device of known times, files read back."""

from __future__ import annotations

import json
import random

import pytest

from fnengine import arrivals
from fnengine.cli import main
from fnengine.cli.tune import judge
from fnengine.graphs.bucket import Bucket
from fnengine.graphs.ladder import Ladder, load
from fnengine.graphs.tune import Costs
from fnengine.host.step import StepInput
from fnengine.measure import measure, staged
from fnengine.simulate import Replay, Step
from tests.toy import ToyDevice

# --- measuring --------------------------------------------------------------------------------------------------------


class Slow:
    """The toy device, which asserts that steps are well formed, with a clock: a step of (T, R) takes what `cost` says,
    now and then ten times that."""

    def __init__(self, toy: ToyDevice):
        self.toy, self.now, self.rng, self.seen, self.kept = toy, 0.0, random.Random(1), [], toy.kept
        self.windows = toy.windows
        self.depth, self.blocks, self.rows, self.max_len, self.host_slots = 0, toy.blocks, toy.rows, toy.max_len, 0

    @staticmethod
    def cost(tokens: int, rows: int) -> float:
        return 1e-3 + 1e-5 * tokens + 2e-5 * rows

    def launch(self, step: StepInput):
        T, R = len(step.token), len(step.row)
        self.seen.append((T, R))
        # What stands in the pool does not matter to times, but the toy wants to have written all that it reads.
        self.toy.pool[:] = 1
        self.now += self.cost(T, R) * (10 if self.rng.random() < 0.05 else 1)
        return self.toy.launch(step)


def test_medians_find_the_times_of_a_device():
    device = Slow(ToyDevice(blocks=200, rows=8, max_len=100))
    got = measure(device, budget=64, rows=8, vocab=97, context=30, seconds=4.0, clock=lambda: device.now)
    assert device.now == pytest.approx(4.0, rel=0.15) and got.rounds >= 5
    assert len(got.medians) > 20 and {r for _, r, _ in got.medians} >= {2, 4, 8}
    for t, r in [(2, 2), (5, 3), (8, 8), (33, 7), (64, 2), (64, 8)]:
        assert got.surface(t, r) == pytest.approx(device.cost(t, r), rel=0.05), (t, r)
    short = Slow(ToyDevice(blocks=200, rows=8, max_len=100))
    got = measure(short, budget=64, rows=8, vocab=97, context=30, seconds=0.0, clock=lambda: short.now)
    assert got.rounds == 1 and len(got.medians) == 5, "the coarsest grid, whatever the time"


def test_what_a_device_cannot_hold_is_not_measured():
    """8 rows of 16 blocks: a row of 200 tokens does not fit 100, and contexts shrink to what the pool has."""
    import numpy as np

    small, rng = ToyDevice(blocks=17, rows=8, max_len=100), np.random.default_rng(0)
    assert staged(small, 200, 2, 0, rng, 97) is None, "longer than rows may be"
    assert staged(small, 9, 9, 0, rng, 97) is None, "more rows than there are"
    admit, timed = staged(small, 20, 8, 90, rng, 97)
    assert (len(timed.token), len(timed.row)) == (20, 8) and sum(len(a.blocks) for a in admit.admit) <= 16
    slow = Slow(small)
    got = measure(slow, budget=512, rows=8, vocab=97, context=90, seconds=0.01, clock=lambda: slow.now)
    assert max(t for t, _, _ in got.medians) <= 8 * 98


# --- the command ------------------------------------------------------------------------------------------------------

QUICK = ["--seconds", "0", "--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens", "64", "--debug"]
LOAD = "requests=40,rate=100,prompt=20,output=12"


def test_tune_writes_what_serve_reads(tmp_path, capsys):
    out, page = tmp_path / "graphs.json", tmp_path / "report.html"
    asked = ["tune", "--synthetic", LOAD, *QUICK, "--out", str(out), "--html", str(page), "--max-graphs", "9"]
    assert main([*asked, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    ladder, about = load(out)
    assert [[b.tokens, b.rows] for b in ladder.buckets] == body["buckets"] and 1 <= len(ladder.buckets) <= 9
    assert {"model", "device", "trace", "date", "fnengine"} <= set(about) and "requests=40" in about["trace"]
    held = body["held_out"]
    assert held["none"]["eager_steps"] == 1 and held["default"]["than_default"] == 0
    assert body["usage"]["tuned"]["steps"] == body["steps"]["held_out"]
    assert not held["default"]["within_budget"] and held["tuned"]["within_budget"]
    assert "<svg" in page.read_text() and "assumed, not measured" in page.read_text()

    assert main(["graphs", "show", str(out)]) == 0
    shown = capsys.readouterr().out
    assert f"{len(ladder.buckets)} buckets" in shown and "held out, tuned" in shown
    assert main(["graphs", "show", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["buckets"] == body["buckets"]


def test_tune_reads_a_trace_and_prints_a_table(tmp_path, capsys):
    trace = tmp_path / "t.jsonl"
    arrivals.write(trace, arrivals.draw(arrivals.parse(LOAD)))
    assert main(["tune", "--trace", str(trace), *QUICK, "--out", str(tmp_path / "g.json")]) == 0
    out, err = capsys.readouterr()
    assert "assumed, not measured" in err and "there are no CUDA graphs here (cpu)" in out
    assert [x.split()[0] for x in out.splitlines()[1:4]] == ["none", "default", "tuned"]
    assert f"serve --graphs {tmp_path / 'g.json'}" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--synthetic", "rats=3"], "sets nothing"),
        (["--synthetic", "requests=3"], "too few"),
        (["--trace", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["--trace", "x", "--synthetic"], "not allowed with"),
        (["--out", "/no/such/folder/g.json"], "no folder"),
        (["--memory-for-graphs", "lots"], "whole number"),
        (["--startup-seconds", "-1"], "number of seconds"),
        (["--max-graphs", "0"], "positive"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    assert main(["tune", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_budget_for_nothing_says_so(capsys, tmp_path):
    words = ["tune", "--synthetic", LOAD, *QUICK[:-1], "--memory-for-graphs", "0", "--out", str(tmp_path / "g.json")]
    assert main(words) == 2
    assert "no graph fits the budget" in capsys.readouterr().err and not (tmp_path / "g.json").exists()


def test_judged_by_hand():
    """Steps (3, 3) twice and (9, 2) once; a token costs 1 s, without a graph 100 s more."""
    steps = tuple(Step(t, r, 0.0, 0.0) for t, r in [(3, 3), (3, 3), (9, 2)])
    replay = Replay(steps, (), 0, None, 0, 0.0)
    costs = Costs(lambda b: b.tokens, lambda t, r: 100.0 + t)
    got = judge(replay, Ladder((Bucket(4, 4),)), costs)
    assert got.seconds == pytest.approx((4 + 4 + 109) / 3) and got.padding == pytest.approx(2 / 117)
    assert got.usage.waste == pytest.approx(2 / (8 + 9))
    none = judge(replay, None, costs)
    assert none.seconds == pytest.approx((103 + 103 + 109) / 3) and none.padding == none.usage.waste == 0
