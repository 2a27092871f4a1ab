"""Traces of arrivals. Oracles: sums by hand, and the distributions' own moments with the false-alarm rate stated."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys

import pytest

from fnengine import arrivals
from fnengine.arrivals import Arrival, Synthetic, draw, halves, parse, read
from fnengine.errors import ConfigError


def test_a_file_is_read_in_order_from_its_first_arrival(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"arrival": 12.5, "prompt": 9, "output": 3, "prefix": 4}\n\n{"output": 1, "arrival": 10, "prompt": 2}\n'
    )
    assert read(path) == (Arrival(0.0, 2, 1), Arrival(2.5, 9, 3, 4))
    arrivals.write(path, read(path))
    assert read(path) == (Arrival(0.0, 2, 1), Arrival(2.5, 9, 3, 4))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", "no object"),
        ("{", "line 2"),
        ('{"arrival": 1, "prompt": 2}', "'output' is missing"),
        ('{"arrival": "1", "prompt": 2, "output": 1}', "'arrival' must be a number"),
        ('{"arrival": NaN, "prompt": 2, "output": 1}', "'arrival' must be at least 0"),
        ('{"arrival": 1, "prompt": 2.5, "output": 1}', "'prompt' must be a whole number"),
        ('{"arrival": 1, "prompt": true, "output": 1}', "'prompt' must be a whole number"),
        ('{"arrival": 1, "prompt": 0, "output": 1}', "'prompt' must be at least 1"),
        ('{"arrival": 1, "prompt": 2, "output": 1, "prefix": 3}', "more than the prompt"),
        ('{"arrival": 1, "prompt": 2, "output": 1, "tokens": 3}', "'tokens' is none of"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, said):
    path = tmp_path / "t.jsonl"
    path.write_text('{"arrival": 1, "prompt": 2, "output": 1}\n' + line + "\n")
    with pytest.raises(ConfigError, match=said) as e:
        read(path)
    assert "line 2" in str(e.value) and "--trace" in str(e.value)


def test_files_that_hold_nothing(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        read(tmp_path / "none")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="no requests"):
        read(tmp_path / "empty")


def test_halves_by_hand():
    trace = tuple(Arrival(float(t), t + 1, 1) for t in (0, 2, 5, 6, 9))
    first, second = halves(trace)
    assert [a.arrival for a in first] == [0, 2] and [a.arrival for a in second] == [0, 1, 4]
    assert halves(trace[:1]) == ((), (Arrival(0.0, 1, 1),))


@pytest.mark.parametrize("burst", [1, 6])
def test_a_drawn_trace_has_the_moments_asked_for(burst):
    """4000 draws, bounds at five standard errors: one false alarm in a million for each, and the seed is fixed."""
    how = Synthetic(requests=4000, rate=20, burst=burst, prompt=300, output=50, seed=3)
    trace = draw(how)
    assert trace == draw(how) != draw(Synthetic(requests=4000, rate=20, burst=burst, prompt=300, output=50, seed=4))
    assert len(trace) == 4000 and all(b.arrival >= a.arrival for a, b in itertools.pairwise(trace))
    # The variance of a count of bursts is its mean, of a burst's geometric size b (b - 1); of requests about 2b.
    assert trace[-1].arrival == pytest.approx(4000 / 20, rel=5 * math.sqrt(2 * burst / 4000))
    for lengths, median, spread in (([a.prompt for a in trace], 300, 0.8), ([a.output for a in trace], 50, 0.6)):
        logs = [math.log(n) for n in lengths]
        assert statistics.fmean(logs) == pytest.approx(math.log(median), abs=5 * spread / math.sqrt(4000) + 0.01)
        assert statistics.stdev(logs) == pytest.approx(spread, rel=5 / math.sqrt(2 * 4000) + 0.01)
    gaps = [b.arrival - a.arrival for a, b in itertools.pairwise(trace)]
    together = sum(g == 0 for g in gaps) / len(gaps)
    assert together == pytest.approx(1 - 1 / burst, abs=5 * 0.5 / math.sqrt(4000))


def test_parameters_by_name():
    assert parse("") == Synthetic()
    how = parse("requests=10, rate=2.5,prefix=64")
    assert how == Synthetic(requests=10, rate=2.5, prefix=64) and parse(str(how)) == how
    assert all(a.prefix == 64 < a.prompt for a in draw(how))
    for text, said in (
        ("rats=1", "sets nothing"),
        ("rate=x", "a number"),
        ("requests=2.5", "whole"),
        ("rate=-1", "-1"),
    ):
        with pytest.raises(ConfigError, match=said):
            parse(text)


def test_lengths_are_bounded():
    trace = draw(Synthetic(requests=50, prompt=1000, output=1000, prefix=20, longest=30))
    assert max(a.prompt for a in trace) == max(a.output for a in trace) == 30


def test_arrivals_need_no_torch():
    code = "import sys, fnengine.arrivals, fnengine.simulate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
