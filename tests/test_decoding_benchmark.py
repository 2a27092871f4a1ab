"""The benchmark of decoding in miniature: every part runs, compares tokens, and says what it measured.

Oracles: its own comparison of tokens (exit status), and figures worked out by hand.
"""

from __future__ import annotations

import json

import pytest

from benchmarks import decoding
from fnengine.host.request import Sampling

QUICK = ["--model", "demo", "--dtype", "float32", "--divide", "32", "--repeats", "1", "--threads", "1"]
QUICK += ["--clock", "cpu", "--enforce-eager"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    for name in ("FNENGINE_THREADS", "OMP_NUM_THREADS"):  # --threads sets them; afterwards they are as before
        monkeypatch.setenv(name, "1")


def run(part: str, tmp_path) -> tuple[int, dict]:
    target = tmp_path / "out.json"
    code = decoding.main(["--part", part, *QUICK, "--json", str(target)])
    return code, json.loads(target.read_text())


@pytest.mark.parametrize(
    ("part", "sides"),
    [
        ("loop,strategy", {"built in", "own loop", "strategy"}),
        ("beam", {"four requests", "one after another", "beam 4"}),
        ("drafts", {"plain", "n-gram, k = 4", "suffix, adapting", "n-gram, 2 ways, k = 4", "always wrong, adapting"}),
    ],
)
def test_a_part_in_miniature(part, sides, tmp_path, capsys):
    code, out = run(part, tmp_path)
    assert code == 0 and {r["part"] for r in out["results"]} == set(part.split(","))
    assert sides <= {side for r in out["results"] for side in r["seconds"]}
    assert all(s > 0 for r in out["results"] for seconds in r["seconds"].values() for s in seconds)
    assert out["commit"] and out["cpu"] and "--part" not in out["versions"] and out["clock"] == "cpu"
    printed = capsys.readouterr().out
    assert "ratio" in printed and "commit" in printed
    assert ("repeats over 0.97" in printed) == (part == "drafts")


def test_companions_in_miniature(tmp_path, capsys):
    code, out = run("companion", tmp_path)
    assert code == 0 and [r["case"].split(",")[0] for r in out["results"]] == ["1 stories"] * 2 + ["4 stories"] * 2
    for r in out["results"]:
        fixed = [name for name in r["seconds"] if "k = " in name]
        assert len(fixed) == 4 and all(0 < r["accepted"][name] < 1 for name in fixed)
        assert all(r["tokens_a_drafted_step"][name] > 1 for name in fixed) and r["accepted"]["plain"] is None
    assert "% accepted" in capsys.readouterr().out


def test_forks_in_miniature(tmp_path):
    code, out = run("fork", tmp_path)
    (fork,) = out["results"]
    assert code == 0 and fork["copied_blocks"] == fork["most_copied"] == 1, "the tail block, each time"
    assert set(fork["microseconds"]) == {"share", "fork", "in place", "fork less in place"}


def test_other_tokens_are_noticed(tmp_path, monkeypatch):
    """Mutant: one's own loop draws at another temperature."""
    monkeypatch.setattr(
        decoding, "vars_of", lambda how: {"temperature": 2.0} if isinstance(how, Sampling) else vars(how)
    )
    code, out = run("loop", tmp_path)
    assert code == 1 and not any(r["equal"] for r in out["results"])


def test_turns_ratios_and_confidence_by_hand():
    """Sides of known time; five of five above the bound have p = 1/32, and the least of five bounds the median with
    31/32; of four, nothing does with 95 %."""
    now, order = [0.0], []

    def side(name: str, seconds: float):
        def turn(repeat: int) -> int:
            order.append(name)
            now[0] += seconds * (1 + repeat)
            return 7

        return turn

    found, equal = decoding.measured({"a": side("a", 2.0), "b": side("b", 1.0)}, 3, lambda: now[0])
    assert equal and found["ratio"] == {"b": 2.0} and found["median"] == {"a": 4.0, "b": 2.0}
    assert "".join(order) == "abbaabba", "one turn of each that does not count, then forth and back"
    assert decoding.sign_test([1.0, 0.98, 1.1, 1.2, 0.99], 0.97) == {"p": 1 / 32, "lower": 0.98, "above": 5, "n": 5}
    assert decoding.sign_test([1.0, 0.9, 1.1, 1.2], 0.97) == {"p": 5 / 16, "lower": 0.0, "above": 3, "n": 4}
