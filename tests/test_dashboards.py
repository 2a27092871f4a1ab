"""Metrics under the names that dashboards ask for. Oracle: the contract's list (section G of it), written out."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.test_tools import HI, served

HISTOGRAMS = [
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "time_to_first_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_time_per_output_token_seconds",
    "iteration_tokens_total",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_max_num_generation_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_inference_time_seconds",
    "request_num_preemptions",
]
COUNTERS = [
    "generation_tokens",
    "request_success",
    "prompt_tokens",
    "num_preemptions",
    "admission_rejections",
    "prefix_cache_queries",
    "prefix_cache_hits",
    "mm_cache_queries",
    "mm_cache_hits",
    "spec_decode_num_drafts",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
    "spec_decode_num_accepted_tokens_per_pos",
]
GAUGES = [
    "num_requests_waiting",
    "num_requests_running",
    "kv_cache_usage_perc",
    "num_requests_waiting_by_reason",
    "cache_config_info",
    "lora_requests_info",
]
LABELS = {
    "request_success": {"finished_reason"},
    "num_requests_waiting_by_reason": {"reason"},
    "spec_decode_num_accepted_tokens_per_pos": {"position"},
    "cache_config_info": {"kv_cache_size_tokens", "kv_cache_max_concurrency", "block_size", "num_gpu_blocks"},
    "lora_requests_info": {"max_lora", "waiting_lora_adapters", "running_lora_adapters"},
}
"""Beside `model_name` and `engine`, which all have."""
OURS = [
    "kv_cache_waste_perc",
    "kv_blocks_total",
    "kv_blocks_held",
    "kv_blocks_cached",
    "steps",
    "recompiles",
    "swaps",
    "step_seconds",
]


def families(text):
    return {f.name: f for f in text_string_to_metric_families(text)}


@pytest.fixture(scope="module")
def told():
    with served({}, metrics=("fnengine", "vllm")) as (client, engine):
        engine.accepted_deep = (3, 1)
        client.post("/v1/chat/completions", json={**HI, "max_tokens": 5, "n": 2})
        yield families(client.get("/metrics").text)


@pytest.mark.parametrize("prefix", ["fnengine", "vllm"])
def test_every_name_of_the_list_is_there_with_its_labels(told, prefix):
    kinds = {"histogram": HISTOGRAMS, "counter": COUNTERS, "gauge": GAUGES}
    for kind, names in kinds.items():
        for name in names:
            family = told[f"{prefix}:{name}"]
            assert family.type == kind and family.documentation, name
            samples = [s for s in family.samples if not s.name.endswith("_created")]
            assert samples, name
            for sample in samples:
                own = {"le"} if sample.name.endswith("_bucket") else set()
                assert set(sample.labels) == {"model_name", "engine"} | LABELS.get(name, set()) | own, name
            suffixes = {"histogram": {"_bucket", "_sum", "_count"}, "counter": {"_total"}, "gauge": {""}}[kind]
            assert {s.name.removeprefix(f"{prefix}:{name}") for s in samples} == suffixes, name


def test_both_prefixes_tell_the_same_and_ours_more(told):
    for name in HISTOGRAMS + COUNTERS + GAUGES:
        assert [(s.labels, s.value) for s in told[f"vllm:{name}"].samples] == [
            (s.labels, s.value) for s in told[f"fnengine:{name}"].samples
        ]
    assert all(f"fnengine:{name}" in told and f"vllm:{name}" not in told for name in OURS)
    requests = {s.labels["finished_reason"]: s.value for s in told["vllm:request_success"].samples}
    assert sum(requests.values()) == 1
    deep = [s.value for s in told["vllm:spec_decode_num_accepted_tokens_per_pos"].samples]
    assert deep == [3, 1]


def test_without_the_option_there_is_one_prefix():
    with served({}) as (client, _):
        assert {name.partition(":")[0] for name in families(client.get("/metrics").text)} == {"fnengine"}
