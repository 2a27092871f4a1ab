"""Sizes from memory and flags. Oracle: arithmetic done by hand on round numbers."""

from __future__ import annotations

import pytest

from fnengine.errors import ConfigError
from fnengine.host.request import Sampling, Stop
from fnengine.settings import MODES, Settings, size_pool

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def pool(settings=None, **kw):
    # 1 KiB of KV a token: a block of 16 tokens is 16 KiB, a MiB holds 64 blocks.
    facts = dict(model_len=4096, bytes_per_token=KIB, rows=8, device="cpu", available=64 * MIB)
    return size_pool(settings=settings or Settings(), **{**facts, **kw})


def test_on_cpu_a_quarter_of_memory():
    size = pool()
    assert size.blocks == 64 * 16 and size.max_len == 4096
    assert size.bytes == 16 * MIB
    assert "quarter" in size.reason


def test_no_more_than_rows_times_length():
    size = pool(available=GIB)
    assert size.blocks == 8 * 256 + 1, "8 rows of 4096 tokens are 256 blocks each, and the null block"
    assert "8 rows x 4096 tokens" in size.reason


def test_the_length_is_cut_to_what_fits_when_nobody_asked_for_one():
    size = pool(available=4 * MIB)  # 1 MiB: 64 blocks, 63 without the null block
    assert (size.blocks, size.max_len) == (64, 63 * 16)
    assert "cut from 4096" in size.reason


def test_too_small_a_pool_names_the_largest_length_that_fits():
    with pytest.raises(ConfigError, match="largest --max-model-len that fits is 1008"):
        pool(Settings(max_model_len=2048), available=4 * MIB)
    with pytest.raises(ConfigError, match="largest --max-model-len that fits is 1008"):
        pool(Settings(kv_cache_memory_bytes=MIB))
    assert pool(Settings(max_model_len=1008), available=4 * MIB).max_len == 1008


def test_no_block_at_all():
    with pytest.raises(ConfigError, match="32768"):
        pool(Settings(kv_cache_memory_bytes=20 * KIB))


def test_a_length_beyond_the_model_is_refused():
    with pytest.raises(ConfigError, match="4096"):
        pool(Settings(max_model_len=4097))


def test_on_cuda_what_utilization_leaves():
    # 100 MiB of card, 40 in use (weights): 0.9 of 100 less 40 is 50 MiB, 3200 blocks; 8 rows x 256 blocks is less.
    facts = dict(device="cuda", total=100 * MIB, available=60 * MIB)
    assert pool(rows=64, **facts).blocks == 3200
    assert pool(Settings(gpu_memory_utilization=0.5), rows=64, **facts).blocks == 640
    # 10 MiB more are kept for steps and graphs: 40 MiB, 2560 blocks.
    kept = pool(rows=64, beside=10 * MIB, **facts)
    assert kept.blocks == 2560 and "kept for steps and graphs" in kept.reason
    with pytest.raises(ConfigError, match="no block of KV"):
        pool(rows=64, beside=50 * MIB, **facts)
    with pytest.raises(ConfigError, match="gpu-memory-utilization"):
        pool(Settings(gpu_memory_utilization=1.5), **facts)


def test_modes_come_from_one_table():
    assert Settings(performance_mode="throughput").mode("cpu") == MODES["cpu", "throughput"]
    assert Settings(max_num_seqs=3).mode("cpu").rows == 3
    with pytest.raises(ConfigError, match="balanced"):
        Settings(performance_mode="fast").mode("cpu")
    with pytest.raises(ConfigError, match="at least 16"):
        Settings(max_num_seqs=16, max_num_batched_tokens=8).mode("cpu")
    assert Settings(max_num_batched_tokens=8).mode("cpu").rows == 8, "each row needs a token of the budget"
    for device in ("cpu", "cuda"):
        rows = [MODES[device, m].rows for m in ("interactivity", "balanced", "throughput")]
        assert rows == sorted(rows)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("frequency_penalty", 2.5),
        ("presence_penalty", -2.5),
        ("repetition_penalty", 0),
        ("allowed_token_ids", ()),
        ("bad_words", ((1,), ())),
        ("bad_words", ((1,) * 300, (2,) * 213)),
        ("no_repeat_ngram_size", -1),
        ("no_repeat_ngram_size", 51),
        ("typical_p", 0),
        ("typical_p", 1.1),
        ("dry_multiplier", -0.1),
        ("dry_multiplier", float("nan")),
        ("dry_base", 0.9),
        ("dry_allowed_length", 0),
        ("dry_penalty_last_n", -2),
        ("dry_sequence_breakers", tuple(range(33))),
        ("xtc_probability", 1.1),
        ("xtc_threshold", -0.1),
        ("seed", 2**64),
    ],
)
def test_sampling_ranges_name_the_field(name, value):
    with pytest.raises(Exception) as e:
        Sampling(**{name: value})
    assert e.value.param == name and e.value.code == 400


def test_stop_ranges():
    for wrong in (dict(max_tokens=-1), dict(max_tokens=3, min_tokens=4), dict(strings=("",))):
        with pytest.raises(Exception) as e:
            Stop(**wrong)
        assert e.value.code == 400
