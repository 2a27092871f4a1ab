"""An engine in this process, driven step by step: requests that all decode, prompts, arrivals; and what its graphs and
its device did meanwhile. There is no HTTP and no event loop: `submit_to` and `turn`."""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import floor, machine, shape
from benchmarks.floor import Rates
from benchmarks.gpu_results import NotMeasured, Sizes
from benchmarks.workloads import percentile

if TYPE_CHECKING:
    import torch

    from fnengine.device import Steps
    from fnengine.engine import Engine
    from fnengine.graphs.dispatch import Choice
    from fnengine.host.output import Delta, StepFacts
    from fnengine.host.request import Sampling
    from fnengine.host.step import Ask
    from fnengine.model import Model
    from fnengine.state import Out

BLOCK = 16
"""Tokens of a block of KV."""
CONFIGS = machine.ROOT / "benchmarks" / "configs"
WAIT = 600.0
"""Seconds after which a load that makes no progress is given up."""


def models() -> list[str]:
    """The names under `benchmarks/configs`, smallest first."""

    def size(name: str) -> float:
        c = json.loads((CONFIGS / name / "config.json").read_text())
        return c["num_hidden_layers"] * c["hidden_size"] * c["intermediate_size"] * c.get("num_local_experts", 1)

    return sorted((p.parent.name for p in CONFIGS.glob("*/config.json")), key=size)


def miniature(name: str, divide: int, folder: Path) -> Path:
    """A folder with the model's config.json, its sizes divided; the heads keep their groups as far as they can."""
    config = json.loads((CONFIGS / name / "config.json").read_text())
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    small_kv = max(1, kv // divide)
    small = {
        "hidden_size": max(64, config["hidden_size"] // divide),
        "intermediate_size": max(64, config["intermediate_size"] // divide),
        "num_hidden_layers": max(2, config["num_hidden_layers"] // divide),
        "num_key_value_heads": small_kv,
        "num_attention_heads": small_kv * min(heads // kv, 4),
        "head_dim": 32,
        "vocab_size": max(512, config["vocab_size"] // divide),
        "max_window_layers": max(2, config["num_hidden_layers"] // divide),
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config |= {k: v for k, v in small.items() if k in config or k == "head_dim"}
    made = folder / name
    made.mkdir(parents=True, exist_ok=True)
    (made / "config.json").write_text(json.dumps(config, indent=1))
    return made


def settings(device: str, sizes: Sizes, **more: Any) -> dict[str, Any]:
    """Fields of `fnengine.Settings` for an engine of the suite. On CPU, where it is only tried, the twin stands in for
    graphs and nothing is compiled."""
    common = {"max_model_len": sizes.max_len, "max_num_seqs": sizes.most_rows, "max_num_batched_tokens": sizes.budget}
    twin = {"graph_twin": True, "enforce_eager": True} if device == "cpu" else {}
    return {**common, **twin, **more}


@dataclass
class Session:
    """A model of the suite on a device, and what measuring it needs; loaded when first asked for.

    Raises:
        SpecError: no family of the engine knows the model.
    """

    name: str
    folder: Path
    """With a tokenizer."""
    device: str
    dtype: str
    sizes: Sizes
    rates: dict[str, float]
    """`read`: bytes a second, `matmul`: operations a second"""
    more: dict[str, Any] = field(default_factory=dict)
    """Settings beside those of the suite."""

    def __post_init__(self) -> None:
        self.shape, self.vocab, _ = shape.measure(self.folder, self.dtype)
        self._numbers = itertools.count()
        self._random = np.random.default_rng(20261121)

    @cached_property
    def model(self) -> Model:
        import fnengine as fn

        return fn.load(self.folder, dtype=self.dtype, device=self.device, load_format="dummy")

    @cached_property
    def engine(self) -> Engine:
        from fnengine.engine import Engine

        engine = Engine.build(self.model, **settings(self.device, self.sizes, **self.more))
        engine.on_step.append(lambda facts: self.steps.append((time.perf_counter(), facts)))
        watch(engine, self.choices)
        return engine

    @cached_property
    def steps(self) -> list[tuple[float, StepFacts]]:
        """(when it was committed, facts) of every step since the list was last cleared."""
        return []

    @cached_property
    def choices(self) -> list[Any]:
        """The graph of every step, or why there was none."""
        return []

    @property
    def best(self) -> Rates:
        return Rates(self.rates["read"], self.rates["matmul"])

    def about(self) -> dict[str, Any]:
        """How the engine runs, in its own words."""
        from fnengine import kernels

        built = self.engine.built
        assert built is not None
        return {
            "execution": built.execution,
            "capture": built.capture,
            "pool": built.pool.reason,
            "ops": {op: f"{backend}: {why}" for op, backend, _, why in kernels.describe(built.ops)},
        }

    def prompt(self, tokens: int) -> np.ndarray:
        """Random token ids that no other prompt begins with."""
        return self._random.integers(3, self.vocab, tokens).astype(np.int32)

    def submit(
        self, prompt: np.ndarray, new: int, sink: Callable[[Delta], None], sampling: Sampling | None = None
    ) -> str:
        """The id of a request for exactly `new` tokens, greedy by default."""
        import fnengine as fn

        request = fn.Request(
            id=f"gpu-{next(self._numbers)}",
            prompt=prompt,
            sampling=sampling or fn.Sampling(temperature=0),
            stop=fn.Stop(max_tokens=new, ignore_eos=True),
        )
        self.engine.submit_to(request, sink)
        return request.id

    def forget(self) -> None:
        """An engine with nothing cached, and empty lists."""
        self.engine.reset_prefix_cache()
        self.steps.clear()
        self.choices.clear()

    def room(self, rows: int, prompt: int, steps: int) -> tuple[int, int]:
        """(how many of `rows` such prompts the pool and the engine hold while all decode for so many steps, tokens that
        each must be allowed for it: the first ones decode while the last are still being read)."""
        built = self.engine.built
        assert built is not None
        rows = min(rows, built.mode.rows)
        reading = rows * prompt // max(1, built.mode.budget - rows)
        most = steps + reading + reading // 2 + 24
        held = min(rows, (built.pool.blocks - 1) // -(-(prompt + most) // BLOCK))
        if not held or prompt + most > built.pool.max_len:
            raise NotMeasured(f"{prompt + most} tokens do not fit: {built.pool.reason}")
        return held, most


@dataclass(frozen=True)
class Watched:
    """A device's way of running steps, with a list of how each was run."""

    steps: Steps
    choices: list[Any]

    def choose(self, tokens: int, rows: int, ask: Ask) -> Choice[Ask]:
        self.choices.append(self.steps.choose(tokens, rows, ask))
        return self.choices[-1]

    def run(self, choice: Choice[Ask], *given: Any) -> Out:
        return self.steps.run(choice, *given)


def watch(engine: Engine, choices: list[Any]) -> None:
    """From now on every step's `graphs.dispatch.Choice` goes to `choices`, if anything is captured."""
    assert engine.built is not None
    device = engine.built.device
    if device.graphs is not None:
        device.steps = Watched(device.steps, choices)


def synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def finished(sink: list[Delta]) -> bool:
    """Whether a request came to its end; raises what ended it early."""
    last = sink[-1] if sink else None
    if last is not None and last.finish == "error":
        raise RuntimeError(f"a request failed: {last.error}")
    return last is not None and last.finish is not None


# ---- decoding -----------------------------------------------------------------------------------------------------


@dataclass
class Decoding:
    """Requests that all decode: each call of `step` is one step of all of them."""

    session: Session
    rows: int
    context: int
    most: int
    """Most tokens of each that will be generated."""
    ids: list[str] = field(default_factory=list)

    def __enter__(self) -> Decoding:
        try:
            return self._begin()
        except BaseException:
            self.__exit__()
            raise

    def _begin(self) -> Decoding:
        s = self.session
        s.forget()
        self.sinks: list[list[Delta]] = [[] for _ in range(self.rows)]
        for sink in self.sinks:
            self.ids.append(s.submit(s.prompt(self.context), self.most, sink.append))
        began = time.monotonic()
        while not (s.steps and _decodes(s.steps[-1][1], self.rows)):
            if not s.engine.turn() or time.monotonic() - began > WAIT:
                raise RuntimeError(f"{self.rows} rows never decoded together: {s.steps[-1:]}")
            for sink in self.sinks:
                finished(sink)
        return self

    def step(self) -> float:
        """When the step was committed."""
        s, before = self.session, len(self.session.steps)
        s.engine.turn()
        assert len(s.steps) == before + 1 and _decodes(s.steps[-1][1], self.rows), s.steps[-1:]
        return s.steps[-1][0]

    def mean_context(self) -> float:
        """Tokens a row holds now, on average."""
        return self.context + statistics.mean(sum(len(d.tokens) for d in sink) for sink in self.sinks)

    def __exit__(self, *_: object) -> None:
        for name in self.ids:
            self.session.engine.abort(name)
        while self.session.engine.turn():
            pass
        self.session.engine.check()


def _decodes(facts: StepFacts, rows: int) -> bool:
    return facts.rows == facts.tokens == rows and not facts.prompt_tokens


def decode(s: Session, rows: int) -> dict[str, Any]:
    """A decode step of `rows` rows: its time over many, the bytes it had to read, and how idle the device was."""
    sizes = s.sizes
    prompt = max(4, sizes.context - sizes.steps)
    held, most = s.room(rows, prompt, sizes.warm + sizes.steps + 1 + sizes.profiled + 2)
    with Decoding(s, held, prompt, most) as running:
        for _ in range(sizes.warm):
            running.step()
        s.choices.clear()
        before = running.mean_context()
        times = [running.step() for _ in range(sizes.steps + 1)]
        graphs = graph_facts(s.choices)
        context = (before + running.mean_context()) / 2
        device = _device_share(s, running)
    each = [b - a for a, b in itertools.pairwise(times)]
    seconds = statistics.median(each)
    work = floor.decode(s.shape, held, context)
    busy = device.get("busy_seconds_a_step")
    if busy is not None:
        device["idle_by_median_step"] = max(0.0, 1 - busy / seconds)
    return {
        "asked_rows": rows,
        "rows": held,
        "context": context,
        "steps": len(each),
        "step_seconds": seconds,
        "step_seconds_mean": statistics.mean(each),
        "step_seconds_p99": percentile(each, 99),
        "tokens_per_second": held / seconds,
        "bytes": work.bytes,
        "achieved_read": work.bytes / seconds,
        "of_read": work.bytes / seconds / s.rates["read"],
        "floor_seconds": work.seconds(s.best),
        "of_floor": work.seconds(s.best) / seconds,
        "graphs": graphs,
        "device": device,
        "engine": s.about(),
    }


def _device_share(s: Session, running: Decoding) -> dict[str, Any]:
    """How much of `profiled` decode steps the device worked: kernels' time over wall time."""
    if s.device == "cpu":
        return {"idle": "not measured"}

    def several(n: int) -> None:
        for _ in range(n):
            running.step()

    profile(s.device, lambda: several(2))  # the first profile of a process pays for setting up
    return kernel_times(profile(s.device, lambda: several(s.sizes.profiled)), s.sizes.profiled)


def profile(device: str, run: Callable[[], Any]) -> torch.profiler.profile:
    """The profile of `run`; of a GPU only what ran on it, because recording the host's part slows launches."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    synchronize(device)
    with profiler(activities=[activity], acc_events=True) as prof:
        run()
        synchronize(device)
    return prof


def on_device(prof: torch.profiler.profile) -> list[tuple[str, float, float]]:
    """(name, begin, end) in seconds of everything that ran on the GPU, copies too."""
    from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

    return [
        (e.name, e.time_range.start * 1e-6, e.time_range.end * 1e-6)
        for e in prof.events() or ()
        if e.device_type == DeviceType.CUDA and not getattr(e, "is_user_annotation", False)
    ]


def kernel_times(prof: torch.profiler.profile, steps: int) -> dict[str, Any]:
    """Kernels' time against wall time, from a profile of a GPU."""
    return idle_of(on_device(prof), steps)


def idle_of(spans: Sequence[tuple[str, float, float]], steps: int) -> dict[str, Any]:
    """How idle a device was between the first and the last of these (name, begin, end); overlaps count once."""
    if not spans:
        raise NotMeasured("the profiler saw nothing on the device")
    busy, reached = 0.0, float("-inf")
    for _, begin, end in sorted(spans, key=lambda span: span[1]):
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    wall = reached - min(begin for _, begin, _ in spans)
    return {
        "idle": 1 - busy / wall if wall else 0.0,
        "busy_seconds_a_step": busy / steps,
        "kernel_seconds_a_step": sum(end - begin for _, begin, end in spans) / steps,
        "wall_seconds_a_step": wall / steps,
        "kernels_a_step": len(spans) / steps,
        "steps": steps,
    }


def top_kernels(s: Session, prof: torch.profiler.profile, steps: int, most: int = 25) -> dict[str, Any]:
    """Where a step's time goes: kernels by name on a GPU, operators by their own time on CPU."""
    by_name: dict[str, list[float]] = {}
    if s.device == "cpu":
        for e in prof.key_averages():
            by_name[e.key] = [e.self_cpu_time_total * 1e-6, e.count]
    else:
        for name, begin, end in on_device(prof):
            entry = by_name.setdefault(name, [0.0, 0])
            entry[0] += end - begin
            entry[1] += 1
    whole = sum(t for t, _ in by_name.values())
    if not whole:
        raise NotMeasured("the profiler saw nothing")
    first = sorted(by_name.items(), key=lambda kv: -kv[1][0])[:most]
    return {
        "steps": steps,
        "device_seconds": whole / steps,
        "kernels": [
            {"name": name, "calls_a_step": n / steps, "seconds_a_step": t / steps, "share": t / whole}
            for name, (t, n) in first
        ],
        "engine": s.about(),
    }


def profile_decode(s: Session, rows: int) -> dict[str, Any]:
    n = s.sizes.profiled
    held, most = s.room(rows, s.sizes.context, s.sizes.warm + n)
    with Decoding(s, held, s.sizes.context, most) as running:
        for _ in range(s.sizes.warm):
            running.step()

        def several() -> None:
            for _ in range(n):
                running.step()

        return {"rows": held, **top_kernels(s, profile(s.device, several), n)}


def profile_prefill(s: Session, tokens: int) -> dict[str, Any]:
    first_token(s, tokens)
    return {"tokens": tokens, **top_kernels(s, profile(s.device, lambda: first_token(s, tokens)), 1)}


# ---- prompts ------------------------------------------------------------------------------------------------------


def first_token(s: Session, tokens: int) -> float:
    """Seconds from submitting a fresh prompt of so many tokens to its first token, nothing else running."""
    sink: list[Delta] = []
    synchronize(s.device)
    began = time.perf_counter()
    s.submit(s.prompt(tokens), 1, sink.append)
    while s.engine.turn():
        pass
    assert finished(sink)
    return time.perf_counter() - began


def prefill(s: Session, tokens: int) -> dict[str, Any]:
    """The time of a prompt, and the rate of its arithmetic."""
    s.forget()
    first_token(s, tokens)  # kernels are chosen and compiled for these sizes
    s.choices.clear()
    each = [first_token(s, tokens) for _ in range(s.sizes.repeats)]
    seconds = statistics.median(each)
    work = floor.prefill(s.shape, [(tokens, 0)])
    return {
        "tokens": tokens,
        "seconds": seconds,
        "all_seconds": each,
        "tokens_per_second": tokens / seconds,
        "flops": work.flops,
        "achieved_flops": work.flops / seconds,
        "of_matmul": work.flops / seconds / s.rates["matmul"],
        "of_floor": work.seconds(s.best) / seconds,
        "graphs": graph_facts(s.choices),
        "engine": s.about(),
    }


# ---- a mixed load -------------------------------------------------------------------------------------------------


def arrivals(rate: float, seconds: float, seed: int = 7) -> list[float]:
    """Times at which requests of a Poisson process come, at least two."""
    rng, at, out = random.Random(seed), 0.0, []
    while (at := at + rng.expovariate(rate)) < seconds or len(out) < 2:
        out.append(at)
    return out


def mixed(s: Session, when: Sequence[float]) -> dict[str, Any]:
    """A load of requests that come at these times, in seconds from now: prompts and answers of many lengths, half of
    them sampled."""
    import fnengine as fn

    s.forget()
    rng = random.Random(11)
    sampled = fn.Sampling(temperature=0.8, top_p=0.95, seed=5)
    wanted = [
        (s.prompt(rng.randint(*s.sizes.prompt)), rng.randint(*s.sizes.new), sampled if i % 2 else None)
        for i in range(len(when))
    ]
    sinks: list[list[Delta]] = [[] for _ in when]
    first: dict[int, float] = {}

    def put(i: int) -> Callable[[Delta], None]:
        def sink(delta: Delta) -> None:
            sinks[i].append(delta)
            first.setdefault(i, time.perf_counter())

        return sink

    synchronize(s.device)
    began, given = time.perf_counter(), 0
    while True:
        now = time.perf_counter() - began
        while given < len(when) and when[given] <= now:
            prompt, new, sampling = wanted[given]
            s.submit(prompt, new, put(given), sampling)
            given += 1
        if not s.engine.turn():
            if given == len(when):
                break
            time.sleep(max(0.0, min(0.001, when[given] - (time.perf_counter() - began))))
    seconds = time.perf_counter() - began
    assert all(map(finished, sinks))
    tokens = sum(sum(len(d.tokens) for d in sink) for sink in sinks)
    assert tokens == sum(new for _, new, _ in wanted)
    gaps = [gap for _, facts in s.steps for gap in facts.gaps]
    waited = [first[i] - began - at for i, at in enumerate(when)]
    s.engine.check()
    return {
        "requests": len(when),
        "offered": len(when) / when[-1] if when[-1] else None,
        "seconds": seconds,
        "requests_per_second": len(when) / seconds,
        "prompt_tokens": sum(len(prompt) for prompt, _, _ in wanted),
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "first": {"p50": percentile(waited, 50), "p99": percentile(waited, 99)},
        "gap": {"p50": percentile(gaps, 50), "p99": percentile(gaps, 99)} if gaps else {},
        "steps": len(s.steps),
        "graphs": graph_facts(s.choices, [(began, None), *s.steps]),
        "recompiles": s.engine.gauges().recompiles,
        "engine": s.about(),
    }


def graph_facts(choices: Sequence[Any], steps: Sequence[tuple[float, Any]] = ()) -> dict[str, Any]:
    """What became of steps: in graphs, in graphs that compute more than was asked, eagerly and why; and padding.

    Args:
        choices: `graphs.dispatch.Choice` of each step, in order; none where nothing is captured.
        steps: (when it was committed, `StepFacts`) of each, headed by (when the first began, None): a step's time is
            that since the one before was committed, and padding's part of it is its part of the tokens.
    """
    if not choices:
        return {"hits": 0, "fallbacks": "nothing is captured"}
    held = [c for c in choices if c.key is not None]
    eager = [c for c in choices if c.key is None]
    padded = sum(map(_padding, choices))
    out: dict[str, Any] = {
        "steps": len(choices),
        "hits": len(held),
        "relaxed": sum(c.relaxed for c in held),
        "fallbacks": len(eager),
        "why": dict(Counter(c.why for c in eager).most_common(8)),
        "kinds": dict(Counter(c.key.kind for c in held)),
        "padding_tokens": padded / (padded + sum(c.tokens for c in choices)),
    }
    if not steps:
        return out
    times = [b - a for (a, _), (b, _) in itertools.pairwise(steps)]
    assert [c.tokens for c in choices] == [f.tokens for _, f in steps[1:]], "steps were committed in another order"
    out["padding_time"] = sum(t * _padding(c) / c.bucket.tokens for t, c in zip(times, choices, strict=True))
    out["padding_time"] /= sum(times)
    out["seconds_eager"] = sum(t for t, c in zip(times, choices, strict=True) if c.key is None)
    buckets: dict[str, dict[str, float]] = {}
    for t, c in zip(times, choices, strict=True):
        name = f"{c.bucket.tokens}x{c.bucket.rows}" if c.key else "eager"
        b = buckets.setdefault(name, {"steps": 0, "tokens": 0, "padding": 0, "seconds": 0.0})
        for key, more in (("steps", 1), ("tokens", c.tokens), ("padding", _padding(c)), ("seconds", t)):
            b[key] += more
    out["buckets"] = dict(sorted(buckets.items(), key=lambda kv: -kv[1]["seconds"])[:40])
    return out


def _padding(c: Any) -> int:
    """Tokens of a step that were computed for nobody; an eager step has none."""
    return 0 if c.key is None else c.bucket.tokens - c.tokens
