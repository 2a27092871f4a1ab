"""Prometheus metrics of one engine, under as many prefixes as are wanted.

Gauges are read from the engine at scrape time. Histograms are arrays of counts: a step with hundreds of rows adds all
its gaps with one searchsorted, where a metrics library's histogram would take a lock and a loop for each.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import CollectorRegistry

from fnengine.host.output import Finished, StepFacts
from fnengine.host.step import BLOCK
from fnengine.serve.engine_port import EnginePort

# Upper bounds as in vLLM's metrics (vllm/v1/metrics/loggers.py), so that its dashboards' quantiles compare.
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
FIRST_TOKEN += (160, 640, 2560)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CHOICES = (1, 2, 5, 10, 20)
PREEMPTIONS = (0, 1, 2, 5, 10)
FASTER = (0.0005, 0.001, 0.002, 0.005)
"""Bounds below vLLM's smallest, for small models: added to `PER_TOKEN` under our own prefix only."""


def one_two_five(limit: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50, ... up to `limit`."""
    out, scale = [], 1
    while scale <= limit:
        out += [m * scale for m in (1, 2, 5) if m * scale <= limit]
        scale *= 10
    return tuple(out)


class Histogram:
    """Counts of values by upper bound, and their sum."""

    def __init__(self, bounds: Sequence[float]):
        self.bounds = np.asarray(bounds, dtype=np.float64)
        self._bounds = self.bounds.tolist()
        self.counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        self.sum = 0.0

    def add(self, values: Sequence[float]) -> None:
        if len(values) == 1:  # a request's end adds a dozen of these, and an array costs ten times as much
            self.counts[bisect_left(self._bounds, values[0])] += 1
            self.sum += values[0]
        elif values:
            v = np.asarray(values, dtype=np.float64)
            # side="left": a value equal to a bound belongs to that bound ("less or equal")
            self.counts += np.bincount(np.searchsorted(self.bounds, v, side="left"), minlength=self.counts.size)
            self.sum += float(v.sum())

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values at most it) pairs, ending with +Inf."""
        names = [str(float(b)) for b in self.bounds] + ["+Inf"]
        return list(zip(names, np.cumsum(self.counts).astype(float).tolist(), strict=True))


class Meter:
    """Listens to an engine's steps and finished requests, and writes them out with its gauges.

    Args:
        engine: gets two observers, which run on its own thread.
        prefixes: each metric appears once per prefix, as `<prefix>:<name>`.
        constants: name -> (value, help) of gauges that do not change, under our own prefix.
    """

    def __init__(
        self,
        engine: EnginePort,
        prefixes: Sequence[str] = ("fnengine",),
        constants: Mapping[str, tuple[float, str]] | None = None,
    ):
        self.engine, self.prefixes, self.constants = engine, prefixes, constants or {}
        lengths = one_two_five(engine.max_len)
        self.histograms = {
            name: (Histogram(bounds), text)
            for name, bounds, text in (
                ("time_to_first_token_seconds", FIRST_TOKEN, "Seconds from arrival to the first token."),
                ("inter_token_latency_seconds", PER_TOKEN, "Seconds between two tokens of a sequence."),
                (
                    "request_time_per_output_token_seconds",
                    PER_TOKEN,
                    "Mean seconds a token after the first, by request.",
                ),
                ("e2e_request_latency_seconds", LATENCY, "Seconds from arrival to the end."),
                ("request_queue_time_seconds", LATENCY, "Seconds from arrival to the first step."),
                ("request_inference_time_seconds", LATENCY, "Seconds from the first step to the end."),
                ("request_prefill_time_seconds", LATENCY, "Seconds from the first step to the first token."),
                ("request_decode_time_seconds", LATENCY, "Seconds from the first token to the end."),
                ("request_prompt_tokens", lengths, "Prompt tokens by request."),
                ("request_generation_tokens", lengths, "Generated tokens by request."),
                ("request_max_num_generation_tokens", lengths, "Most tokens a request could generate."),
                ("request_params_max_tokens", lengths, "max_tokens by request."),
                ("request_params_n", CHOICES, "n by request."),
                ("request_num_preemptions", PREEMPTIONS, "Preemptions by request."),
                ("iteration_tokens_total", STEP_TOKENS, "Tokens computed by step."),
                ("step_seconds", (*FASTER, *PER_TOKEN), "Seconds from launch to read, by step."),
            )
        }
        self.ended = {reason: 0 for reason in ("stop", "length", "abort", "error")}
        self.prompt_tokens = 0
        self.generated = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)  # type: ignore[arg-type]
        engine.on_step.append(self.on_step)
        engine.on_finish.append(self.on_finish)

    def _add(self, name: str, *values: float) -> None:
        self.histograms[name][0].add(values)

    def on_step(self, step: StepFacts) -> None:
        self.prompt_tokens += step.prompt_tokens
        self.generated += step.generated
        self._add("iteration_tokens_total", step.tokens)
        self._add("inter_token_latency_seconds", *step.gaps)
        self._add("time_to_first_token_seconds", *step.first)
        self._add("step_seconds", step.seconds)

    def on_finish(self, r: Finished) -> None:
        """Counts every end; only requests that ended by themselves enter the distributions."""
        self.ended[r.finish] += 1
        if r.finish not in ("stop", "length"):
            return
        self._add("e2e_request_latency_seconds", r.end - r.arrival)
        self._add("request_prompt_tokens", r.prompt)
        self._add("request_generation_tokens", r.completion)
        self._add("request_max_num_generation_tokens", r.max_tokens)
        self._add("request_params_max_tokens", r.max_tokens)
        self._add("request_params_n", r.n)
        self._add("request_num_preemptions", r.preemptions)
        if r.scheduled is not None:
            self._add("request_queue_time_seconds", r.scheduled - r.arrival)
            self._add("request_inference_time_seconds", r.end - r.scheduled)
        if r.first_token is not None:
            self._add("request_decode_time_seconds", r.end - r.first_token)
            if r.scheduled is not None:
                self._add("request_prefill_time_seconds", r.first_token - r.scheduled)
            later = r.completion / r.n - 1
            if later > 0:
                self._add("request_time_per_output_token_seconds", (r.end - r.first_token) / later)

    def text(self) -> tuple[str, str]:
        """The exposition and its content type."""
        return generate_latest(self._registry).decode("utf-8"), CONTENT_TYPE_LATEST

    def collect(self) -> Iterable[Metric]:
        """Every metric under every prefix."""
        for prefix in self.prefixes:
            yield from self._families(prefix)

    def _families(self, prefix: str) -> Iterable[Metric]:
        g = self.engine.gauges()
        labels, values = ["model_name", "engine"], [self.engine.name, "0"]

        def gauge(name: str, value: float, text: str) -> Metric:
            family = GaugeMetricFamily(f"{prefix}:{name}", text, labels=labels)
            family.add_metric(values, value)
            return family

        def counter(name: str, value: float, text: str) -> Metric:
            family = CounterMetricFamily(f"{prefix}:{name}", text, labels=labels)
            family.add_metric(values, value)
            return family

        yield gauge("num_requests_running", g.running, "Sequences that are being computed.")
        yield gauge("num_requests_waiting", g.waiting, "Sequences that wait.")
        by_reason = GaugeMetricFamily(
            f"{prefix}:num_requests_waiting_by_reason", "Sequences that wait, by why.", labels=[*labels, "reason"]
        )
        for reason, count in g.waiting_by_reason:
            by_reason.add_metric([*values, reason], count)
        yield by_reason
        yield gauge("kv_cache_usage_perc", g.kv_usage, "Blocks held by live sequences over all blocks, 0 to 1.")
        yield counter("prefix_cache_queries", g.prefix_queries, "Prompt tokens looked up in the prefix cache.")
        yield counter("prefix_cache_hits", g.prefix_hits, "Prompt tokens found in the prefix cache.")
        yield counter("num_preemptions", g.preemptions, "Sequences put back to make room.")
        yield counter("admission_rejections", g.rejections, "Requests refused because the queue was full.")
        yield counter("prompt_tokens", self.prompt_tokens, "Prompt tokens computed.")
        yield counter("generation_tokens", self.generated, "Tokens generated.")
        yield counter("spec_decode_num_drafts", g.draft_steps, "Steps of sequences that held a draft.")
        yield counter("spec_decode_num_draft_tokens", g.drafted, "Draft tokens verified.")
        yield counter("spec_decode_num_accepted_tokens", g.accepted, "Draft tokens found right.")
        depth = CounterMetricFamily(
            f"{prefix}:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens found right, by place in the draft.",
            labels=[*labels, "position"],
        )
        for position, count in enumerate(g.accepted_deep):
            depth.add_metric([*values, str(position)], count)
        yield depth
        # Dashboards ask for these two. Texts have no media to cache, and nothing here loads adapters: none were seen.
        yield counter("mm_cache_queries", 0, "Media looked up in a cache; this server reads text.")
        yield counter("mm_cache_hits", 0, "Of these, found.")
        adapters = {"max_lora": "0", "waiting_lora_adapters": "", "running_lora_adapters": ""}
        loras = GaugeMetricFamily(f"{prefix}:lora_requests_info", "Adapters, as labels.", labels=[*labels, *adapters])
        loras.add_metric([*values, *adapters.values()], 0)
        yield loras
        ended = CounterMetricFamily(
            f"{prefix}:request_success", "Requests that have ended, by how.", labels=[*labels, "finished_reason"]
        )
        for reason, count in self.ended.items():
            ended.add_metric([*values, reason], count)
        yield ended
        tokens = g.blocks_total * BLOCK
        facts = {
            "block_size": str(BLOCK),
            "num_gpu_blocks": str(g.blocks_total),
            "kv_cache_size_tokens": str(tokens),
            "kv_cache_max_concurrency": f"{tokens / self.engine.max_len:.2f}",
        }
        info = GaugeMetricFamily(f"{prefix}:cache_config_info", "The KV pool, as labels.", labels=[*labels, *facts])
        info.add_metric([*values, *facts.values()], 1)
        yield info
        for name, (histogram, text) in self.histograms.items():
            if name == "step_seconds" and prefix != "fnengine":
                continue
            family = HistogramMetricFamily(f"{prefix}:{name}", text, labels=labels)
            family.add_metric(values, histogram.buckets(), histogram.sum)
            yield family
        if prefix != "fnengine":
            return
        for name, (value, text) in self.constants.items():
            yield gauge(name, value, text)
        yield gauge("kv_cache_waste_perc", g.kv_waste, "Allocated minus needed KV over allocated, 0 to 1.")
        yield gauge("kv_blocks_total", g.blocks_total, "Blocks in the pool.")
        yield gauge("kv_blocks_held", g.blocks_held, "Blocks held by live sequences.")
        yield gauge("kv_blocks_cached", g.blocks_cached, "Free blocks whose content can still be found.")
        if g.window_blocks_total:
            yield gauge("kv_window_blocks_held", g.window_blocks_held, "Blocks of layers with a window, held.")
            yield gauge("kv_window_blocks_cached", g.window_blocks_cached, "Free ones whose content can be found.")
        yield counter("steps", g.steps, "Steps committed.")
        yield counter("swaps", g.swaps, "Sequences whose KV was moved to host memory.")
        yield counter("recompiles", g.recompiles, "Traces compiled after warm-up.")
        if (graphs := self.engine.graphs()) is not None:
            yield from _graph_families(graphs, labels, values)


def _graph_families(graphs: Mapping[str, Any], labels: list[str], values: list[str]) -> Iterable[Metric]:
    """Hits, padding and fallbacks of captured steps, under our own prefix."""

    def counter(name: str, text: str, label: str, counts: Iterable[tuple[str, float]]) -> Metric:
        family = CounterMetricFamily(f"fnengine:{name}", text, labels=[*labels, label])
        for of, n in counts:
            family.add_metric([*values, of], n)
        return family

    def gauge(name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"fnengine:{name}", text, labels=labels)
        family.add_metric(values, value)
        return family

    of = [(f"{b['bucket'][0]}x{b['bucket'][1]}", b) for b in graphs["buckets"]]
    padded = [(name, b["bucket"][0] * b["steps"] - b["tokens"]) for name, b in of]
    yield counter(
        "graph_hits", "Steps replayed, by bucket (tokens x rows).", "bucket", [(n, b["steps"]) for n, b in of]
    )
    yield counter(
        "graph_tokens", "Tokens of replayed steps, padding left out.", "bucket", [(n, b["tokens"]) for n, b in of]
    )
    yield counter("graph_padding_tokens", "Tokens computed only to fill a bucket.", "bucket", padded)
    eager = [(why, h["steps"]) for why, h in graphs["eager"].items()]
    yield counter("graph_fallbacks", "Steps that ran eagerly, by why.", "reason", eager)
    yield counter("graph_relaxed", "Steps replayed in a graph of a wider key.", "reason", graphs["relaxed"].items())
    yield gauge("graphs_captured", "Graphs held.", sum(b["graphs"] for _, b in of))
    yield gauge("graph_bytes", "Memory that graphs took when they were captured.", sum(b["bytes"] for _, b in of))
    spent = sum(b["capture_seconds"] for _, b in of)
    yield gauge("graph_capture_seconds", "Time that capturing took.", spent)
