"""Part `companion` of `benchmarks.decoding`: the bundled draft model and head beside the bundled model, in one engine.

Sides are engines: without companion, with `demo-draft`, with `demo-eagle`; each at 1, 8 and 32 sequences of plain
stories, which all three models know. Beside seconds there is the share of draft tokens that were accepted, and tokens
that a step of a sequence gave.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fnengine.engine import Engine

ROWS = (1, 8, 32)
NAMES = ("Tom", "Mia", "Ruth", "Luca", "Anna", "Ben", "Sara", "Paul")
BEGINNINGS = (
    "Once upon a time, there was a child named {} who",
    "{} had a red ball. Every day",
    "One morning {} went to the park and",
    "{} was a kind girl who lived in",
)


def stories(n: int) -> list[str]:
    """Beginnings of so many stories, at most 32 of them different."""
    made = [text.format(name) for name, text in product(NAMES, BEGINNINGS)]
    return [made[i % len(made)] for i in range(n)]


def run(
    tokens: int,
    repeats: int,
    clock: Callable[[], float],
    options: dict[str, Any],
    measured: Callable[..., tuple[dict[str, Any], bool]],
    rows: tuple[int, ...] = ROWS,
) -> tuple[list[dict[str, Any]], bool]:
    """(a result for each number of sequences and way of sampling, whether all sides gave the same tokens)."""
    import fnengine as fn
    from fnengine.decoding import eagle
    from fnengine.engine import Engine
    from fnengine.host.request import Request, Speculate, fold_in

    model = fn.load("demo")
    beside: dict[str, Any] = {
        "plain": None,
        "demo-draft": fn.load("demo-draft"),
        "demo-eagle": eagle.load("demo-eagle", model),
    }
    sizes = {"max_num_seqs": max(rows), "max_model_len": min(model.spec.max_len, tokens + 64)}
    engines = {name: Engine.build(model, companion=c, **sizes, **options) for name, c in beside.items()}
    method = {"demo-draft": "draft_model", "demo-eagle": "eagle"}
    numbers = iter(range(1 << 30))
    stop = fn.Stop(max_tokens=tokens, ignore_eos=True)

    def made(engine: Engine, prompts: list[list[int]], how: fn.Sampling, ask: Speculate | None) -> list[list[int]]:
        engine.drafting.clock = clock
        engine.reset_prefix_cache()
        out: list[list[int]] = [[] for _ in prompts]
        for i, (line, prompt) in enumerate(zip(out, prompts, strict=True)):
            here = fn.Sampling(temperature=how.temperature, seed=fold_in(how.seed or 0, i))
            request = Request(f"r{next(numbers)}", np.array(prompt, np.int32), here, stop, speculate=ask)
            engine.submit_to(request, lambda delta, line=line: line.extend(delta.tokens))
        while engine.turn():
            pass
        return out

    results, right = [], True
    for n, temperature in product(rows, (0.0, 1.0)):
        prompts = [model.encode(text) for text in stories(n)]
        counted: dict[str, list[int]] = {}

        def side(
            name: str,
            ask: Speculate | None,
            label: str,
            prompts: list[list[int]] = prompts,
            t: float = temperature,
            counted: dict[str, list[int]] = counted,
        ) -> Any:
            engine = engines[name]

            def turn(repeat: int) -> list[list[int]]:
                before = engine.gauges()
                tokens = made(engine, prompts, fn.Sampling(temperature=t, seed=1 + max(repeat, 0)), ask)
                after, counts = engine.gauges(), counted.setdefault(label, [0, 0, 0])
                for i, what in enumerate(("drafted", "accepted", "draft_steps")):
                    counts[i] += getattr(after, what) - getattr(before, what)
                return tokens

            return turn

        sides = {"plain": side("plain", None, "plain")}
        for name, what in method.items():
            asks = {f"{name}, k = {k}": Speculate(what, k, adapt=False) for k in (2, 4)}
            for label, ask in {**asks, f"{name}, adapting": Speculate(what, 4)}.items():
                sides[label] = side(name, ask, label)
        found, equal = measured(sides, repeats, clock)
        found["accepted"] = {name: a / d if d else None for name, (d, a, _) in counted.items()}
        found["tokens_a_drafted_step"] = {name: 1 + a / s if s else None for name, (_, a, s) in counted.items()}
        results.append({"case": f"{n} stories, temperature {temperature:g}", **found})
        right = right and equal
    return results, right
