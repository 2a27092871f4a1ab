"""What decoding by one's own code costs, and what strategies, forks, beams and drafts bring. In this process.

    python -m benchmarks.decoding [--part loop,strategy,fork,beam,drafts] [--model demo --model benchmarks/configs/...]
        [--repeats 5] [--threads 1] [--json FILE]

    loop      a hand-written loop over `Runtime.extend(..., sample=)` against `LLM.generate`, 32 sequences
    strategy  `LLM.generate(strategy=sample)` against `LLM.generate`, likewise
    fork      microseconds of an extend by one token of a forked sequence of 4,096 tokens (a row of its own, a copied
              tail block) and of one that goes on in place; the difference is the fork. Blocks that are copied
    beam      beam width 4 against four requests that compute their prompt each, prefix caching off, all at once and one
              after another: a long prompt and few tokens, and the reverse. At once is the hard rival: its four rows
              share every step, so what is left to win is three prompts of four
    drafts    the bundled model, one sequence: n-gram, suffix and prediction on text that repeats, and each with
              adaptation on text that does not, against plain decoding; with the confidence that the ratio is over 0.97
    steps     the same by requests of an engine, which verifies drafts inside of its steps
    companion the bundled draft model and head beside the bundled model: 1, 8 and 32 sequences, acceptance, too

Sides take turns within every repeat (A B A B), the order reversed from one to the next; figures are medians, ratios are
by repeat: the other side's seconds over this side's, so more than 1 is faster. Tokens of both sides are compared where
they must be equal, and a difference is exit status 1. `--clock cpu` counts the process's processor time, that of the
strategies' thread included, instead of the wall's: for a machine that others use, and for `--threads 1` only. `--divide
16` makes every size smaller, to try the script; those figures mean nothing.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import companion, machine, report, shape
from benchmarks.comparison import SHAPE
from benchmarks.workloads import Prompts

PARTS = ("loop", "strategy", "fork", "beam", "drafts", "steps", "companion")
ONE = {"drafts", "steps", "companion"}
"""Parts about the bundled model."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
LEAST = 0.97
"""What adaptation promises never to fall below, as a share of plain decoding's speed."""
STORY = "Tom had a red ball. Mia had a blue kite. They went to the park. "

Side = Callable[[int], Any]
"""What is timed, given the number of the repeat; its value is what must be equal."""


@dataclass(frozen=True)
class Sizes:
    rows: int = 32
    prompt: int = 64
    new: int = 64
    fork: int = 4096
    forks: int = 32
    long: int = 1024
    short: int = 16
    text: int = 192
    """Tokens generated with drafts."""

    def divided(self, by: int) -> Sizes:
        return Sizes(**{name: max(4, n // by) for name, n in vars(self).items()})


def measured(sides: Mapping[str, Side], repeats: int, clock: Callable[[], float]) -> tuple[dict[str, Any], bool]:
    """(seconds of each side by repeat, medians and ratios to the first side; whether all values were equal). One
    turn of every side comes before, which is not counted."""
    names, seconds, equal = list(sides), {name: [] for name in sides}, True
    for repeat in range(-1, repeats):
        values = {}
        for name in names if repeat % 2 else names[::-1]:
            gc.collect()
            began = clock()
            values[name] = sides[name](repeat)
            if repeat >= 0:
                seconds[name].append(clock() - began)
        equal = equal and all(v == values[names[0]] for v in values.values())
    out: dict[str, Any] = {"seconds": seconds, "median": {n: statistics.median(s) for n, s in seconds.items()}}
    ratios = {n: [a / b for a, b in zip(seconds[names[0]], seconds[n], strict=True)] for n in names[1:]}
    out["ratios"] = ratios
    out["ratio"] = {n: statistics.median(r) for n, r in ratios.items()}
    return out, equal


def sign_test(ratios: Sequence[float], least: float) -> dict[str, float]:
    """How sure it is that the median ratio is over `least`: `p` is the chance of so many above it were the median just
    there (one-sided, no assumption about the distribution), `lower` the bound that the median is above with 95 %."""
    n, above = len(ratios), sum(r > least for r in ratios)
    p = sum(math.comb(n, i) for i in range(above, n + 1)) / 2**n
    # The j-th smallest of n is a lower bound with confidence 1 - P(Binomial(n, 1/2) < j).
    tail, j = 0.0, 0
    while (tail := tail + math.comb(n, j) / 2**n) <= 0.05:
        j += 1
    return {"p": p, "lower": sorted(ratios)[j - 1] if j else 0.0, "above": above, "n": n}


# --- parts ------------------------------------------------------------------------------------------------------------


def loop(llm: Any, sizes: Sizes, repeats: int, clock: Callable[[], float]) -> tuple[list[dict[str, Any]], bool]:
    """One's own loop against the engine's path, the same seeds, sampled and greedy."""
    from fnengine import Sampling, Stop
    from fnengine.host.request import fold_in

    prompts, stop = Prompts(llm.model.spec.vocab), Stop(max_tokens=sizes.new, ignore_eos=True)
    rt = llm._runtime
    out, right = [], True
    for name, how in (("greedy", Sampling(temperature=0, seed=1)), ("sampled", Sampling(top_p=0.95, seed=1))):

        def given(repeat: int, name: str = name) -> list[list[int]]:
            return prompts.many(sizes.rows, sizes.prompt, "loop", name, repeat)

        def builtin(repeat: int, how: Sampling = how, given: Any = given) -> list[list[int]]:
            return [list(c.choices[0].tokens) for c in llm.generate(given(repeat), how, stop)]

        def own(repeat: int, how: Sampling = how, given: Any = given) -> list[list[int]]:
            rt.forget_rows()
            seeded = Sampling(**{**vars_of(how), "seed": fold_in(1, 0)})
            made = rt.extend([(rt.empty, p) for p in given(repeat)], sample=seeded)
            lines = [[token] for _, token in made]
            for _ in range(sizes.new - 1):
                made = rt.extend([(seq, [token]) for seq, token in made], sample=seeded)
                for line, (_, token) in zip(lines, made, strict=True):
                    line.append(token)
            del made
            rt.drain()
            return lines

        found, equal = measured({"built in": builtin, "own loop": own}, repeats, clock)
        out.append({"case": name, **found})
        right = right and equal
    return out, right


def vars_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass."""
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def strategy(llm: Any, sizes: Sizes, repeats: int, clock: Callable[[], float]) -> tuple[list[dict[str, Any]], bool]:
    """The strategy that defines sampling against the path that does it."""
    from fnengine import Sampling, Stop
    from fnengine.decoding import sample

    prompts, stop = Prompts(llm.model.spec.vocab), Stop(max_tokens=sizes.new, ignore_eos=True)
    out, right = [], True
    for name, how in (("greedy", Sampling(temperature=0, seed=1)), ("sampled", Sampling(top_p=0.95, seed=1))):

        def generated(repeat: int, how: Sampling = how, name: str = name, **options: Any) -> list[list[int]]:
            given = prompts.many(sizes.rows, sizes.prompt, "strategy", name, repeat)
            return [list(c.choices[0].tokens) for c in llm.generate(given, how, stop, **options)]

        def by_strategy(repeat: int, generated: Any = generated) -> list[list[int]]:
            return generated(repeat, strategy=sample)

        found, equal = measured({"built in": generated, "strategy": by_strategy}, repeats, clock)
        # With a seed, choice 0 of a strategy has the seed folded once more: tokens differ unless greedy.
        out.append({"case": name, **found})
        right = right and (equal or name != "greedy")
    return out, right


def fork(model: Any, options: dict[str, Any], sizes: Sizes, clock: Callable[[], float]) -> dict[str, Any]:
    """Microseconds of an extend by one token of a long sequence in place and of one that others hold (the fork), of
    the share alone, and how many blocks were copied for each fork."""
    from fnengine import Runtime

    rt = Runtime(model, **{**options, "max_model_len": sizes.fork + 2 * sizes.forks + 32, "max_num_seqs": 4})
    length = sizes.fork - 5  # the tail block is not full: the dear case
    prompt = Prompts(model.spec.vocab).many(1, length, "fork")[0]
    base, _ = rt.extend(rt.empty, prompt, logits=None)
    copied: list[int] = []
    launch = rt._device.launch

    def counted(step: Any) -> Any:
        copied.append(len(step.copy))
        return launch(step)

    times: dict[str, list[float]] = {"share": [], "fork": [], "in place": []}
    copies: list[int] = []
    going, _ = rt.extend(base, [1], logits=None)  # whoever extends `base` now has to copy its tail
    rt._device.launch = counted  # type: ignore[method-assign]
    free = rt.free_blocks
    for i in range(2 * sizes.forks):
        began = clock()
        shared = base[:length]
        times["share"].append(clock() - began)
        del shared
        copied.clear()
        began = clock()
        forked, _ = rt.extend(base, [2 + i % 7], logits=None)
        times["fork"].append(clock() - began)
        copies += copied
        assert free - rt.free_blocks == 1, "a fork holds a tail of its own and nothing else"
        forked.close()
        began = clock()
        going, _ = rt.extend(going, [1], logits=None)
        times["in place"].append(clock() - began)
        free = rt.free_blocks
    rt._device.launch = launch  # type: ignore[method-assign]
    half = {name: statistics.median(t[sizes.forks :]) * 1e6 for name, t in times.items()}
    most = max(copies)
    assert most <= 1, "a fork copies its tail block at most"
    half["fork less in place"] = half["fork"] - half["in place"]
    return {"tokens": length, "microseconds": half, "copied_blocks": statistics.mean(copies), "most_copied": most}


def beam(llm: Any, sizes: Sizes, repeats: int, clock: Callable[[], float]) -> tuple[list[dict[str, Any]], bool]:
    """Beams on shared blocks against four greedy requests with a prompt each, at once and in turn; they make other
    texts, so only lengths are compared."""
    from fnengine import Sampling, Stop
    from fnengine.decoding import beam as beam_search

    prompts, out = Prompts(llm.model.spec.vocab), []
    greedy = Sampling(temperature=0, seed=1)
    for name, long, new in (("long prompt", sizes.long, sizes.short), ("long text", sizes.short, sizes.long // 4)):
        stop = Stop(max_tokens=new, ignore_eos=True)

        def separate(repeat: int, name: str = name, long: int = long, stop: Stop = stop) -> int:
            (prompt,) = prompts.many(1, long, "beam", name, repeat)
            return len(llm.generate([prompt] * 4, greedy, stop)[0].choices[0].tokens)

        def in_turn(repeat: int, name: str = name, long: int = long, stop: Stop = stop) -> int:
            given = prompts.many(1, long, "beam", name, repeat)
            lengths = {len(llm.generate(given, greedy, stop)[0].choices[0].tokens) for _ in range(4)}
            assert len(lengths) == 1
            return lengths.pop()

        def beams(repeat: int, name: str = name, long: int = long, stop: Stop = stop) -> int:
            given = prompts.many(1, long, "beam", name, repeat)
            done = llm.generate(given, greedy, stop, strategy=beam_search, strategy_args={"width": 4})
            return len(done[0].choices[0].tokens)

        sides = {"four requests": separate, "one after another": in_turn, "beam 4": beams}
        found, equal = measured(sides, repeats, clock)
        found["to in turn"] = statistics.median(
            a / b for a, b in zip(found["seconds"]["one after another"], found["seconds"]["beam 4"], strict=True)
        )
        out.append({"case": f"{name}, {long} in, {new} out", **found})
        assert equal, "beams and requests generate as many tokens"
    return out, True


def drafts(sizes: Sizes, repeats: int, clock: Callable[[], float], options: dict[str, Any]) -> tuple[Any, bool]:
    """Each proposer against no proposer, on the bundled model, at one sequence."""
    import fnengine as fn
    from fnengine.decoding.ngram import NGram
    from fnengine.decoding.prediction import Prediction
    from fnengine.decoding.speculate import speculate
    from fnengine.decoding.suffix import Suffix

    model = fn.load("demo")
    rt = fn.Runtime(model, **{**options, "max_num_seqs": 8})
    stop = fn.Stop(max_tokens=sizes.text, ignore_eos=True)
    rng = np.random.default_rng(3)
    texts = {
        "copying": (model.encode(STORY * 3), fn.Sampling(temperature=0, seed=1)),
        "not copying": (rng.integers(300, model.spec.vocab, 32).tolist(), fn.Sampling(temperature=1.0, seed=1)),
    }
    out, right = [], True
    for name, (prompt, how) in texts.items():

        def told(proposer: Any, k: int, adapt: bool, prompt: list[int] = prompt, how: fn.Sampling = how) -> Side:
            def side(repeat: int) -> Any:
                # Other noise in every repeat, the same for all sides; greedy text stays what it is.
                here = fn.Sampling(**{**vars_of(how), "seed": max(repeat, 0) + 1})
                made = speculate(rt, prompt, proposer, k=k, sampling=here, stop=stop, adapt=adapt, clock=clock)
                return made.tokens

            return side

        known = speculate(rt, prompt, NGram(), k=0, sampling=how, stop=stop).tokens
        kinds: dict[str, Any] = {"n-gram": NGram(), "suffix": Suffix(), "n-gram, 2 ways": NGram(branches=2)}
        kinds["prediction"] = Prediction.of(known)
        if name == "not copying":  # drafts that fail: a prediction of another text
            kinds["prediction"] = Prediction.of(rng.integers(300, model.spec.vocab, sizes.text).tolist())
            kinds["always wrong"] = _Wrong()
        sides = {"plain": told(NGram(), 0, False)}
        for kind, proposer in kinds.items():
            if name == "copying":
                sides[f"{kind}, k = 4"] = told(proposer, 4, False)
            sides[f"{kind}, adapting"] = told(proposer, 4, True)
        found, equal = measured(sides, repeats, clock)
        found["over_0.97"] = {n: sign_test(r, LEAST) for n, r in found["ratios"].items() if "adapting" in n}
        out.append({"case": name, **found})
        right = right and equal
    return out, right


def steps(sizes: Sizes, repeats: int, clock: Callable[[], float], options: dict[str, Any]) -> tuple[Any, bool]:
    """Requests with drafts against the same requests without, one at a time."""
    import fnengine as fn
    from fnengine.engine import Engine
    from fnengine.host.request import Request, Speculate, fold_in

    model = fn.load("demo")
    engine = Engine.build(model, max_num_seqs=8, proposers={"always wrong": lambda _: _Wrong()}, **options)
    engine.drafting.clock = clock
    stop = fn.Stop(max_tokens=sizes.text, ignore_eos=True)
    rng = np.random.default_rng(3)
    texts = {
        "copying": (model.encode(STORY * 3), fn.Sampling(temperature=0)),
        "not copying": (rng.integers(300, model.spec.vocab, 32).tolist(), fn.Sampling(temperature=1.0)),
    }
    numbers = iter(range(1 << 30))

    def made(prompt: list[int], how: fn.Sampling, speculate: Speculate | None) -> list[int]:
        tokens: list[int] = []
        given = np.array(prompt, np.int32)
        request = Request(f"r{next(numbers)}", given, how, stop, speculate=speculate)
        engine.submit_to(request, lambda delta: tokens.extend(delta.tokens))
        while engine.turn():
            pass
        return tokens

    out, right = [], True
    for name, (prompt, how) in texts.items():

        def told(ask: Speculate | None, prompt: list[int] = prompt, how: fn.Sampling = how) -> Side:
            def side(repeat: int) -> Any:
                here = fn.Sampling(**{**vars_of(how), "seed": fold_in(1, max(repeat, 0))})
                return made(prompt, here, ask)

            return side

        known = tuple(made(prompt, fn.Sampling(**{**vars_of(how), "seed": 1}), None))
        asks = {kind: Speculate(kind, 4) for kind in ("ngram", "suffix")}
        asks["prediction"] = Speculate("prediction", 4, prediction=known)
        if name == "not copying":
            other = tuple(rng.integers(300, model.spec.vocab, sizes.text).tolist())
            asks["prediction"] = Speculate("prediction", 4, prediction=other)
            asks["always wrong"] = Speculate("always wrong", 4)
        sides = {"plain": told(None)}
        for kind, ask in asks.items():
            if name == "copying":
                for k in (4, 8, 16):
                    sides[f"{kind}, k = {k}"] = told(Speculate(kind, k, False, ask.prediction))
            sides[f"{kind}, adapting"] = told(ask)
        found, equal = measured(sides, repeats, clock)
        found["over_0.97"] = {n: sign_test(r, LEAST) for n, r in found["ratios"].items() if "adapting" in n}
        out.append({"case": name, **found})
        right = right and equal
    return out, right


@dataclass(frozen=True)
class _Wrong:
    """Four tokens that never come, at every step: the worst of proposers."""

    def start(self, tokens: Sequence[int], how: Any) -> int:
        return 0

    def propose(self, state: int, k: int) -> tuple[int, ...]:
        return (0,) * k

    def advance(self, state: int, tokens: Sequence[int]) -> int:
        return 0


# --- all of it --------------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    from fnengine import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default=",".join(PARTS), help=f"of {', '.join(PARTS)}, separated by commas")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        help=f"of parts but drafts, steps and companion (default: demo and {SHAPE})",
    )
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="drafts take at least 20, unless sizes are divided")
    parser.add_argument("--threads", type=int, default=environment.threads())
    parser.add_argument("--clock", default="wall", choices=list(CLOCKS))
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--divide", type=int, default=1, help="divide all sizes, to try the script")
    parser.add_argument("--json", default=None)
    args = parser.parse_args(argv)
    args.part = args.part.split(",")
    if unknown := set(args.part) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu counts one thread: --threads 1")
    args.model = args.model or ["demo", SHAPE]
    return args


HEAD = ("part", "case", "model", "side", "seconds", "ratio", "by repeat")


def lines(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of the table under `HEAD`."""
    out = []
    for r in results:
        for side, seconds in r.get("median", {}).items():
            ratios = r["ratios"].get(side)
            out.append(
                [
                    r["part"],
                    r["case"],
                    r["model"],
                    side,
                    f"{seconds:.4f}",
                    "1" if ratios is None else f"{r['ratio'][side]:.3f}",
                    "" if ratios is None else f"{min(ratios):.2f}..{max(ratios):.2f}",
                ]
            )
        if "to in turn" in r:
            out.append(
                [r["part"], r["case"], r["model"], "beam 4 to one after another", "", f"{r['to in turn']:.3f}", ""]
            )
        for side, us in r.get("microseconds", {}).items():
            out.append([r["part"], f"{r['tokens']} tokens", r["model"], side, f"{us * 1e-6:.6f}", "", ""])
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 when two ways to the same tokens gave different ones."""
    from fnengine import environment

    args = arguments(argv)
    environment.set_threads(args.threads)
    import fnengine as fn

    sizes = Sizes().divided(args.divide) if args.divide > 1 else Sizes()
    clock, others, right, results = CLOCKS[args.clock], machine.Others(), True, []

    def note(part: str, model: str, found: list[dict[str, Any]], equal: bool = True) -> None:
        nonlocal right
        right = right and equal
        for f in found:
            results.append({"part": part, "model": model, "equal": equal, **f})
        print(report.table(HEAD, lines(results[-len(found) :])), flush=True)

    eager: dict[str, Any] = {"enforce_eager": args.enforce_eager}
    for name in args.model if set(args.part) - ONE else ():
        folder, load_format = shape.prepare(name)
        model = fn.load(folder, dtype=shape.own_dtype(folder, args.dtype), load_format=load_format)
        longest = max(sizes.prompt + sizes.new, sizes.long + sizes.short, sizes.long // 4 + sizes.short) + 16
        # Without prefix caching, or whoever comes second would find the prompts computed.
        known = {
            "enable_prefix_caching": False,
            "max_num_seqs": max(sizes.rows, 8),
            "max_model_len": min(longest, model.spec.max_len),
            **eager,
        }
        if {"loop", "strategy"} & set(args.part):
            llm = fn.LLM(model, **known)
            for part, run in (("loop", loop), ("strategy", strategy)):
                if part in args.part:
                    note(part, name, *run(llm, sizes, args.repeats, clock))
            del llm
        if "fork" in args.part:
            fits = min(sizes.fork, model.spec.max_len - 2 * sizes.forks - 32)
            found = fork(model, eager, Sizes(**{**vars(sizes), "fork": fits}), clock)
            note("fork", name, [{"case": "fork", **found}])
        if "beam" in args.part:
            llm = fn.LLM(model, **known)
            fits = min(sizes.long, known["max_model_len"] - sizes.short - 1)
            note("beam", name, *beam(llm, Sizes(**{**vars(sizes), "long": fits}), args.repeats, clock))
            del llm
        del model
        gc.collect()
    repeats = args.repeats if args.divide > 1 else max(20, args.repeats)
    for part, run in (("drafts", drafts), ("steps", steps)):
        if part not in args.part:
            continue
        note(part, "demo", *run(sizes, repeats, clock, eager))
        for r in [r for r in results if r["part"] == part]:
            for side, sure in r.get("over_0.97", {}).items():
                print(
                    f"{r['case']}, {side}: {sure['above']} of {sure['n']} repeats over {LEAST} of plain, "
                    f"p = {sure['p']:.2g}; median over {sure['lower']:.3f} with 95 %"
                )
    if "companion" in args.part:
        rows = companion.ROWS if args.divide == 1 else (1, 4)
        found, equal = companion.run(sizes.new, args.repeats, clock, eager, measured, rows)
        note("companion", "demo", found, equal)
        for r in found:
            for side, share in r["accepted"].items():
                if share is not None:
                    each = r["tokens_a_drafted_step"][side]
                    print(f"{r['case']}, {side}: {100 * share:.1f} % accepted, {each:.2f} tokens a drafted step")
    facts, share = machine.facts(args.threads), others.share()
    print(f"{facts['cpu']}, {facts['date']}, commit {facts['commit']}, {args.clock} time, others {100 * share:.0f} %")
    if share > report.BUSY:
        print("WARNING  the machine was not quiet: these figures are not for writing down")
    about = {"clock": args.clock, "dtype": args.dtype, "sizes": vars(sizes), "repeats": args.repeats}
    report.write(args.json, {**facts, **about, "others": share, "results": results})
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
