"""Every example runs as a user would run it, and agrees with another way to the same text."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import fnengine as fn

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(p.name for p in (ROOT / "examples").glob("*.py"))
PROMPT = "Once upon a time"


@cache
def printed(name: str) -> str:
    """What an example prints; it must end well and say nothing on stderr but the server's own lines."""
    done = subprocess.run(
        [sys.executable, "-W", "error", f"examples/{name}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "FNENGINE_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr == "", done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def llm():
    return fn.LLM("demo", max_num_seqs=4)


def test_examples_have_under_60_lines():
    assert EXAMPLES == [
        "best_of_n.py",
        "capture_function.py",
        "custom_strategy.py",
        "greedy_loop.py",
        "guidance.py",
        "offline_generate.py",
        "openai_client.py",
        "own_family.py",
        "own_proposer.py",
        "steering.py",
        "tree_search.py",
    ]
    for name in EXAMPLES:
        assert len((ROOT / "examples" / name).read_text().splitlines()) < 60


def test_a_captured_function_is_the_function_whatever_its_padding():
    """Oracle: the example's own comparison with torch's mean; its table counted by hand for steps of 3, 8, 1, 6, 3."""
    lines = printed("capture_function.py").splitlines()
    assert lines[0].startswith("mean of 21 rows")
    assert [line.split()[:6] for line in lines[2:6]] == [
        ["2", "x", "2", "1", "1", "2"],
        ["4", "x", "4", "2", "6", "8"],
        ["8", "x", "8", "2", "14", "16"],
        ["all", "5", "21", "26", "19.2%", "-"],
    ]


def test_the_greedy_loop_is_what_generate_does(llm):
    """Oracle: the engine, greedy."""
    text, slices = printed("greedy_loop.py").strip().rsplit("\n", 1)
    (wanted,) = llm.generate(PROMPT, fn.Sampling(temperature=0), fn.Stop(max_tokens=32))
    assert text == PROMPT + wanted.text
    choice = wanted.choices[0]
    length = (
        len(llm.model.encode(PROMPT)) + len(choice.tokens) - (choice.finish == "stop")
    )  # the loop keeps no stop token
    assert slices == f"{length} tokens; {length - 8} of them kept by the slice, 8 computed again"


def test_best_of_n_keeps_the_likeliest_fork(llm):
    """Oracle: each fork is the continuation that the engine samples for its seed, scored by a plain forward over it."""
    *lines, blocks = printed("best_of_n.py").splitlines()
    prompt = "In the morning the fox"
    rt = fn.Runtime(llm.model, max_num_seqs=4)
    ids, scores = llm.model.encode(prompt), {}
    for seed in range(6):
        (done,) = llm.generate(
            prompt,
            fn.Sampling(temperature=0.9, seed=seed),
            fn.Stop(max_tokens=24, ignore_eos=True),
        )
        tokens = list(done.choices[0].tokens)
        _, logits = rt.extend(rt.empty, ids + tokens, logits="all")
        logp = logits.log_softmax(-1)[len(ids) - 1 : -1]
        scores[llm.model.decode(tokens)] = float(logp[range(24), tokens].mean())
    shown = [tuple(line.split("  ", 1)) for line in lines]
    assert {text for _, text in shown} == {f"{prompt}{text!r}" for text in scores}
    assert [float(s) for s, _ in shown] == pytest.approx(sorted(scores.values(), reverse=True), abs=0.02)
    counted = re.fullmatch(r"blocks beyond the prompt's: (\d+) for 6 forks, (\d+) for the best one alone", blocks)
    assert counted and 0 < int(counted[2]) < int(counted[1])


def test_a_custom_strategy_takes_the_likelier_road(llm):
    """Oracle: the same rule over a plain loop of `extend`, one prompt at a time, every road computed from nothing."""
    rt = fn.Runtime(llm.model, max_num_seqs=4)
    for line in printed("custom_strategy.py").splitlines():
        prompt, rest = line.split(" ...", 1)
        ids, out = llm.model.encode(prompt), []
        while len(out) < 24 and (not out or out[-1] not in llm.model.spec.eos):
            logp = rt.extend(rt.empty, ids + out)[1].log_softmax(-1)
            roads = [t for t in logp.topk(2).indices.tolist() if logp[t] >= logp.max() + math.log(0.5)]
            scores = []
            for first in roads:
                road, score = [first], float(logp[first])
                for _ in range(4):
                    after = rt.extend(rt.empty, ids + out + road)[1].log_softmax(-1)
                    road.append(int(after.argmax()))
                    score += float(after.max())
                scores.append(score)
            out.append(roads[scores.index(max(scores))])
        finish = "stop" if out[-1] in llm.model.spec.eos else "length"
        assert rest == f"{llm.model.decode(out)!r} ({finish})"


def test_generating_and_serving_say_the_same(llm):
    """Oracle: two ways in, one path: the greedy answer offline and through HTTP and the openai client."""
    offline, http = printed("offline_generate.py"), printed("openai_client.py")
    answer = re.search(r"assistant: (.*)\n\((\d+) tokens", offline, re.DOTALL)
    assert answer is not None
    assert re.fullmatch(re.escape(answer[1]) + rf"\n\({answer[2]} tokens from http://127.0.0.1:\d+\)\n", http)
    assert (
        answer[1] == llm.chat([{"role": "user", "content": "Hello! Who are you?"}], fn.Sampling(temperature=0))[0].text
    )
    assert offline.count(" ...") == 3


def test_ones_own_proposer_changes_the_steps_and_not_the_text(llm):
    """Oracle: the engine's greedy text; 48 tokens in fewer steps."""
    text, *ways = printed("own_proposer.py").splitlines()
    prompt = "Tom had a red ball. Mia had a blue kite. They went to the park. " * 3 + "Tom had a"
    wanted = llm.generate(prompt, fn.Sampling(temperature=0), fn.Stop(max_tokens=48, ignore_eos=True))[0]
    assert text == f"text: {llm.model.decode(list(wanted.choices[0].tokens))!r}"
    steps = {m[1]: int(m[2]) for way in ways if (m := re.match(r"(\w+): (\d+) steps for 48 tokens", way))}
    assert set(steps) == {"Echo", "NGram"} and max(steps.values()) < 48


def test_a_steered_text_is_that_of_the_loop(llm):
    """Oracle: a loop of `extend` with the vector that taps give; a vector of zeros is no steering at all."""
    rt = fn.Runtime(llm.model, max_num_seqs=4, steer=("layers.2",))
    source = (ROOT / "examples" / "steering.py").read_text()
    here, there = (re.search(rf'{name} = "(.*)"', source)[1] for name in ("HERE", "THERE"))  # type: ignore[index]
    taps = [rt.extend(rt.empty, llm.model.encode(t), taps=["layers.2.residual"])[2] for t in (here, there)]
    vector = torch.stack([t["layers.2.residual"].float()[1:].mean(0) for t in taps])
    vector = vector[0] - vector[1]
    _, *lines = printed("steering.py").splitlines()
    texts = {}
    for line in lines:
        scale, text = re.fullmatch(r"(\S+) Once upon a time, there was a(.*)", line).groups()  # type: ignore[union-attr]
        seq, new, out = rt.empty, llm.model.encode("Once upon a time, there was a"), []
        for _ in range(24):
            steer = {"layers.2": float(scale) * vector}
            seq, token = rt.extend(seq, new, sample=fn.Sampling(temperature=0), steer=steer)
            out.append(token)
            new = [token]
        assert text == repr(llm.model.decode(out))
        texts[float(scale)] = text
    asked = fn.Sampling(temperature=0), fn.Stop(max_tokens=24, ignore_eos=True)
    assert texts[0.0] == repr(llm.generate("Once upon a time, there was a", *asked)[0].text)
    assert len(set(texts.values())) == 3


def test_guidance_of_0_and_1_is_either_prompt_alone_and_of_2_is_the_strategy(llm):
    """Oracle: the engine on each prompt by itself, drawn at the other's positions where lengths differ; the shipped
    strategy `guided` for what lies beyond."""
    from examples.guidance import LIKE, UNLIKE
    from examples.guidance import guided as example
    from fnengine.decoding import Job, guided, run
    from fnengine.host.request import fold_in

    said = dict(line.split(": ", 1) for line in printed("guidance.py").splitlines())
    ids, away = llm.model.encode(LIKE), llm.model.encode(UNLIKE)
    rt = fn.Runtime(llm.model, max_num_seqs=4)

    def plain(prompt):
        seq, logits = rt.extend(rt.empty, prompt)
        made = []
        for i in range(24):
            made.append(fn.sample(logits, temperature=0.7, seed=7, position=len(ids) + i))
            seq, logits = rt.extend(seq, made[-1:])
        return repr(llm.model.decode(made))

    assert said["0"] == plain(away) and said["1"] == plain(ids)
    assert said["2"] == repr(llm.model.decode(example(rt, ids, away, 2.0, 24)))
    how, stop = fn.Sampling(temperature=0.7, seed=7), fn.Stop(max_tokens=24, ignore_eos=True)
    (done,) = run(rt, [Job(guided, ids, {"scale": 2.0, "negative": away}, how, stop)])
    assert list(done.tokens) == example(rt, ids, away, 2.0, 24, seed=fold_in(7, 0)), "a strategy's seed is folded"
    assert len(set(said.values())) == 3


def test_the_search_finds_a_likelier_text_than_greedy(llm):
    """Oracle: the log-probabilities of both texts, from the engine's `prompt_logprobs`."""
    scores = {}
    for line in printed("tree_search.py").splitlines():
        name, score = re.match(r"(\w+): (-[\d.]+)  The robin lived in a'.*'$", line).groups()
        scores[name] = float(score)
    (greedy,) = llm.generate(
        "The robin lived in a", fn.Sampling(temperature=0), fn.Stop(max_tokens=12, ignore_eos=True), logprobs=0
    )
    assert scores["greedy"] == pytest.approx(sum(p.logprob for p in greedy.choices[0].logprobs), abs=0.02)
    assert scores["search"] > scores["greedy"]
