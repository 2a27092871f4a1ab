"""The byte ledger. Oracles: arithmetic by hand, the real tensors' bytes, what the system says a process holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fnengine import environment, hub, kernels, leaves, model, params, tree
from fnengine.build import check_indices
from fnengine.cli import main
from fnengine.device import make_state
from fnengine.engine import Engine
from fnengine.errors import ConfigError, RequestError
from fnengine.host.answers import ENTRY, fits, weigh
from fnengine.host.output import Delta, TokenLogprob
from fnengine.host.request import Request, Stop
from fnengine.kernels import team
from fnengine.leaves import Packing
from fnengine.memory import MIB, Shapes, account, fitted, on_card, size
from fnengine.settings import Mode, Settings
from fnengine.spec import Attention, Layer, Mlp, ModelSpec, Rope
from tests.models import tiny_folder

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")

LAYER = Layer(Attention(4, 2, 16, Rope(1e4, 16), 0.25), Mlp(96), 1e-6)
SPEC = ModelSpec("llama", "LlamaForCausalLM", 1000, 64, (LAYER, LAYER), 1e-6, True, 512, "float32", (2,), 1)
SHAPES = Shapes(SPEC, torch.float32, Packing("dense", ""), Mode(budget=32, rows=8), max_len=512, blocks=5)


RARE = 4 * 8 + 1 + 4 * 32 + 4 * 32 + 2 * 4 * 512 + 4 * 128
"""Of a row's rare parameters: 8 words, a flag, 32 words of allowed tokens (1,000 bits), 32 breakers, 2 x 512 words of
bad words, 128 watched tokens."""
ROWS = 9 * (4 * 9 + 8 + 4 * 32 + 4 * 513 + 3 * 4 * 512 + RARE)
"""9 rows of 12 one-word fields but for the seed's two, 32 blocks, 513 tokens, 3 x 512 words of bias; and RARE."""


def test_every_line_by_hand():
    """Two layers of width 64, 4 heads and 2 KV heads of 16, 96 wide in the middle; vocabulary 1,000; float32."""
    a = account(dataclasses.replace(SHAPES, base=100 * MIB, host_slots=3, threads=2, compiled=False))
    layer = 128 * 64 + 64 * 64 + 192 * 64 + 64 * 96 + 2 * 64  # qkv, o, gate and up, down, two norms
    assert a.line("weights").bytes == 4 * (1000 * 64 + 2 * layer + 64)
    block = 16 * 2 * 2 * 2 * 16 * 4  # tokens, k and v, layers, KV heads, channels, bytes
    assert a.line("KV pool").bytes == 5 * block and a.line("swap space").bytes == 3 * block
    assert a.line("rows").bytes == ROWS
    assert a.line("base").bytes == 100 * MIB and a.line("code").bytes == 28 * MIB
    assert a.line("tokenizer").bytes == 620_000 and a.line("recorded steps").bytes == 0
    widths = max(64 + 128 + 128, 128 + 128, 128 + 192, 64 + 288)
    eager = 32 * (2 * 96 * 4 + 2 * 4 * 512 * 4) + 2 * 512 * 32 * 4
    pair = 128 + 16 * 4  # of a softmax, and an output; twice, beside a query, scores, weights and three factors
    attention = 2 * (96 * (2 * pair + 16 * 4 + 2 * 64 * 4 + 12) + 16 * 4 + 11 * 128 + 512 * 1024) + 32 * 4 * 2 * pair
    assert a.line("workspace").bytes == 32 * widths * 4 + 32 * 16 * 4 + eager + attention + 2 * (MIB + 8 * 1000)
    loading = a.line("weights").bytes + 900_000  # dense weights are read into their place, then the tokenizer
    assert a.line("loading").bytes == loading
    assert a.at_rest == sum(x.bytes for x in a.rest)
    assert a.at_worst == a.at_rest + 3 * SHAPES.answer_bytes + SHAPES.answer_bytes
    assert a.peak == a.at_worst > a.while_loading


def test_what_a_card_keeps_free_by_hand():
    """The same model with bfloat16 and steps of 4096 tokens, of which graphs hold up to 2048."""
    live = 2 * (4 * 64 + 3 * 96) + 16 * 4  # x and three like it, gate and up and their product; angles
    logits, history = 8 * 1000 * 18, 8 * 512 * 44
    mode = Mode(budget=4096, rows=8)

    def kept(**how) -> int:
        return on_card(SPEC, torch.bfloat16, mode, 512, **how)

    direct = ROWS + 4096 * live + logits + history + 256 * MIB
    assert kept(graphs=0, compiled=True) == direct
    assert kept(graphs=10, compiled=True) == direct + 2048 * live + logits + history + 40 * MIB
    assert kept(graphs=0, compiled=False) == direct + 4096 * 16 * 96


def test_compiled_layers_count_with_32_bits():
    """The widest buffer of this model has 192 elements a token: gate and up."""
    most = (2**31 - 1) // 192
    check_indices(SPEC, most)
    with pytest.raises(ConfigError, match=f"at most {most}"):
        check_indices(SPEC, most + 1)


def test_fewer_rows_at_a_time_where_log_probabilities_are_many():
    """64 x 152k logits sorted whole take 64 x 152k x (4 + 12 + 4) bytes, 8 of them an eighth."""
    spec = dataclasses.replace(SPEC, vocab=152_000)
    s = dataclasses.replace(SHAPES, spec=spec, mode=Mode(budget=64, rows=64), max_logprobs=-1)
    V = 152_000
    assert account(s).line("scoring").bytes == 2 * 64 * V * 4 + 8 * V * (4 + 12 + 4) + 64 * (V * 16 + 128 * 4)


KINDS = ("dense", "packed", "tiled", "int8", "int4")


@pytest.mark.parametrize("family", ["llama2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_are_the_bytes_of_the_real_tensors(family, kind, dtype, monkeypatch):
    """Oracle: the loaded tree itself, tied and untied, in every layout."""
    how = leaves.quantizing(CPU, dtype, kind) if kind in leaves.QUANTIZED else leaves.layouts(CPU, dtype)[kind]
    if isinstance(how, str):
        pytest.skip(how)
    from fnengine import checkpoint

    folder = tiny_folder(family)
    spec = checkpoint.read_spec(folder)
    tensors = checkpoint.load(folder, spec, dtype, CPU, how)
    held = sum(
        leaves.weight_bytes(x) if isinstance(x, leaves.KINDS) else x.nbytes
        for _, x in tree.items(tensors, stop=leaves.KINDS)
    )
    s = dataclasses.replace(SHAPES, spec=spec, dtype=dtype, how=how)
    assert account(s).line("weights").bytes == held == params.memory_plan(spec, dtype, how).weights


def test_pool_and_rows_are_the_bytes_of_the_real_state():
    a = account(SHAPES)
    state = make_state(
        SPEC, kernels.ops(CPU, torch.float32).kv, blocks=5, rows=8, max_len=512, dtype=torch.float32, device=CPU
    )
    assert a.line("KV pool").bytes == sum(t.nbytes for p in state.pool for t in (p.k, p.v))
    assert a.line("rows").bytes == sum(t.nbytes for t in tree.leaves(state.rows))


# --- --memory ---------------------------------------------------------------------------------------------------------


def test_blocks_follow_from_memory_to_the_last_byte():
    """Law: the ledger of what was planned fits, and one block more does not."""
    block = 16 * 2 * 2 * 2 * 16 * 4
    for spare in (0, 1, block - 1, block, 10 * block + 7):
        least = account(dataclasses.replace(SHAPES, blocks=33)).at_worst  # 512 tokens and the null block
        got = fitted(SHAPES, least + spare, 512)
        assert got.blocks == 33 + spare // block and got.max_len == 512
        assert account(got).at_worst <= least + spare < account(got).at_worst + block


def test_no_more_blocks_than_rows_can_use():
    assert fitted(SHAPES, 1 << 40, 512).blocks == 1 + 8 * 32


def test_the_length_is_cut_when_nobody_asked_for_one():
    least = account(dataclasses.replace(SHAPES, blocks=33)).at_worst
    got = fitted(SHAPES, least - 20 * 16 * 512, None)
    assert 16 <= got.max_len < 512 and (got.blocks - 1) * 16 >= got.max_len
    assert account(got).at_worst <= least - 20 * 16 * 512


def test_what_does_not_fit_says_by_how_much_and_what_would():
    """Oracle: the remedies, tried."""
    need = account(dataclasses.replace(SHAPES, blocks=33)).peak
    with pytest.raises(ConfigError, match=r"3 MiB too few .* 512 tokens of KV, 8 sequences and 32 tokens") as e:
        fitted(SHAPES, need - 3 * MIB, 512)
    assert e.value.where == "--memory" and "--answer-memory 16MiB" in (e.value.remedy or "")
    fitted(dataclasses.replace(SHAPES, answer_bytes=16 * MIB), need - 3 * MIB, 512)
    with pytest.raises(ConfigError, match="no flag saves that much: give at least"):
        fitted(SHAPES, MIB, 512)


def test_memory_excludes_a_pool_size_and_impossible_lengths():
    with pytest.raises(ConfigError, match="excludes"):
        size(SHAPES, Settings(memory=1 << 30, kv_cache_memory_bytes=1 << 20), 1 << 33, 1 << 34)
    with pytest.raises(ConfigError, match="positions up to 512"):
        size(SHAPES, Settings(memory=1 << 30, max_model_len=1024), 1 << 33, 1 << 34)


def test_without_memory_a_quarter_but_never_what_is_still_to_come():
    """Oracle: a quarter, until what the ledger still expects leaves less."""
    s = dataclasses.replace(SHAPES, mode=Mode(budget=4096, rows=4096))
    beside = account(dataclasses.replace(s, blocks=1)).beside_pool
    pool, _ = size(s, Settings(), available=4 * beside, total=8 * beside)
    assert pool.bytes <= beside and "quarter" in pool.reason
    pool, kept = size(s, Settings(), available=beside + 32 * MIB, total=8 * beside)
    assert pool.bytes <= 32 * MIB < pool.bytes + MIB and kept.at_worst <= beside + 32 * MIB


# --- limits of the machine --------------------------------------------------------------------------------------------


def group(folder: Path, limit: str, used: int, cache: int, names=("memory.max", "memory.current"), key="inactive_file"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1\n{key} {cache}\n")


def test_limits_of_cgroups_in_both_versions(tmp_path):
    """Oracle: folders written here as the kernel has them."""
    own = tmp_path / "cgroup"
    two = tmp_path / "two"
    own.write_text("0::/system.slice/engine.service\n")
    group(two / "system.slice", "9000", 800, 100)
    group(two / "system.slice" / "engine.service", "5000", 700, 200)
    assert environment.memory_limits(two, own) == [(5000, 500), (9000, 700)]
    group(two / "system.slice" / "engine.service", "max", 700, 200)
    assert environment.memory_limits(two, own) == [(9000, 700)]
    one = tmp_path / "one"
    own.write_text("12:cpu,cpuacct:/x\n4:memory:/box\n0::/\n")
    group(
        one / "memory/box", "6000", 900, 300, ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_inactive_file"
    )
    unlimited = str(2**63 - 4096)
    group(one / "memory", unlimited, 9, 0, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    assert environment.memory_limits(one, own) == [(6000, 600)]
    assert environment.memory_limits(tmp_path / "none", tmp_path / "neither") == []


# --- what may be asked ------------------------------------------------------------------------------------------------


def asked(length: int, **kw) -> Request:
    return Request(id="r", prompt=np.zeros(length, np.int32), **kw)


LIMITS = dict(rows=64, budget=512, answer_bytes=1000 * ENTRY)


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (asked(335, prompt_logprobs=2), "prompt_logprobs"),  # 334 x 3
        (asked(2, prompt_logprobs=40_000), "prompt_logprobs"),  # a step of 512 of them would be 328 MB
        (asked(2, logprobs=300_000), "logprobs"),
        (asked(9, n=128, logprobs=1, stop=Stop(max_tokens=4)), "logprobs"),  # 128 x 4 x 2
    ],
)
def test_answers_that_cannot_be_held_are_refused_by_name(request_, field):
    with pytest.raises(RequestError) as e:
        fits(request_, **LIMITS)
    assert e.value.param == field and e.value.code == 400 and e.value.remedy


def test_answers_that_can_be_held_are_not_refused():
    fits(asked(334, prompt_logprobs=2), **LIMITS)
    fits(asked(9, n=128, logprobs=1, stop=Stop(max_tokens=3)), **LIMITS)
    fits(asked(100_000, n=128, stop=Stop(max_tokens=100_000)), **LIMITS)  # no log-probabilities: seen while it grows
    fits(asked(9, logprobs=5), **LIMITS)


def test_a_delta_weighs_its_tokens_and_their_log_probabilities():
    top = ((1, -0.5), (2, -1.5))
    delta = Delta(
        0, "ab", (1, 2), (TokenLogprob(1, -0.5, top), TokenLogprob(2, -1.5, top)), (None, TokenLogprob(1, 0.0))
    )
    assert weigh(delta) == 512 * 2 + ENTRY * (3 + 3 + 1 + 1)


def test_the_engine_refuses_before_anything_is_allocated():
    engine = Engine.build(model.load(tiny_folder("qwen3")), Settings(answer_bytes=MIB), tokenizer=_stand_in())
    before = engine.gauges()
    with pytest.raises(RequestError, match="--answer-memory"):
        engine.submit(asked(120, prompt_logprobs=20))
    assert engine.gauges() == before


def _stand_in():
    from fnengine.cli.start import stand_in

    return stand_in(512)


# --- the command, a process, threads ----------------------------------------------------------------------------------


def test_plan_prints_what_the_ledger_says(capsys):
    # The base is measured in this process, which has run other tests.
    assert main(["plan", "--memory", "4GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = found["lines"]
    assert found["at_worst"] <= 4 << 30 and found["pool"]["bytes"] == lines["KV pool"]
    assert found["at_rest"] == sum(
        lines[x] for x in lines if x not in ("sampling", "scoring", "writing an answer", "answers", "loading")
    )
    assert main(["plan", "--memory", "4GiB"]) == 0
    out = capsys.readouterr().out
    assert "at worst" in out and f"{lines['weights'] / 2**20:,.1f}" in out


def test_plan_says_what_would_fit(capsys):
    assert main(["plan", "--memory", "2GiB", "--max-model-len", "256", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    least = found["at_worst"] - found["lines"]["KV pool"]
    assert main(["plan", "--memory", f"{(least >> 20) - 100}MiB"]) == 2
    error = capsys.readouterr().err
    assert "too few" in error and "--answer-memory 16MiB" in error


def test_plan_needs_no_weights(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((ROOT / "benchmarks/configs/qwen3-0.6b/config.json").read_bytes())
    assert main(["plan", str(tmp_path), "--memory", "4GiB", "--max-model-len", "1K", "-q", "int4", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    # Bytes by hand: 4.5 bits a weight of the layers, 8.125 of the embedding, two bytes of 28 x 2,304 + 1,024 of norms.
    body, ends, norms = 28 * (4096 * 1024 + 2048 * 1024 + 9216 * 1024), 151_936 * 1024, 28 * (2 * 1024 + 256) + 1024
    assert lines["weights"] == body * 9 // 16 + ends * 65 // 64 + 2 * norms


def test_a_process_holds_what_was_predicted():
    """Oracle: the system. The demo model, filled; within 10 %, also with cold caches, which ask for 951 MiB."""
    command = [sys.executable, "-m", "benchmarks.memory", "--model", "demo", "--quantization", "none"]
    command += ["--memory", "1000MiB", "--threads", "1", "--json", "/dev/stdout"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    case = json.loads(done.stdout[done.stdout.index("\n{") :])["cases"][0]
    for name in ("at rest", "worst step", "while loading"):
        assert abs(case["compared"][name]["share"]) < 0.1, case["compared"]
    assert case["compared"]["worst step"]["measured"] < 1000 * MIB


def test_the_team_is_openmps_own():
    """Oracle: the kernel's list of this process's threads, and OpenMP's count of another region."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = team.members(2)
        if not found:
            pytest.skip("torch's OpenMP runtime was not found")
        assert len(set(found)) == 2 and found[0] == threading.get_native_id()
        assert {str(t) for t in found} <= set(os.listdir("/proc/self/task"))
        assert team.members(2) == found, "the runtime keeps its threads"
    finally:
        torch.set_num_threads(before)


def test_helpers_are_pinned_and_the_caller_is_not():
    """Oracle: the system's own list of processors of each thread."""
    code = (
        "import os, torch\n"
        "from fnengine import environment\n"
        "from fnengine.kernels import team\n"
        "torch.set_num_threads(2)\n"
        "free, found = os.sched_getaffinity(0), team.members(2)\n"
        "last = environment.processors()[-1]\n"
        "placed = team.pin(found, [0, last])\n"
        "assert placed == {found[1]: last}, placed\n"
        "assert os.sched_getaffinity(found[1]) == {last} and os.sched_getaffinity(found[0]) == free\n"
        "(torch.ones(1 << 20) * 2).sum()\n"
        "assert team.members(2) == found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_recording_a_step_does_not_bring_dynamo():
    """Oracle: the modules of a process whose layers are in the cache and whose steps are recorded."""
    code = (
        "import sys, fnengine as fn\n"
        "llm = fn.LLM('demo', max_model_len=256)\n"
        "cold = 'torch._dynamo' in sys.modules\n"
        "llm.generate('Once', stop=fn.Stop(max_tokens=8))\n"
        "assert cold or 'torch._dynamo' not in sys.modules\n"
        "print('cold' if cold else llm.engine.built.execution)\n"
    )
    for _ in range(2):  # the first fills the cache
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-2000:]
    if "eager" not in done.stdout:
        assert "recorded" in done.stdout, done.stdout


def test_plan_knows_of_a_draft_model(capsys):
    """Oracle: the ledger of an engine with that companion. Methods without models change nothing, heads are refused."""
    # Room enough beside what this process holds by now, which a plan counts.
    flags = ["plan", "--memory", "6GiB", "--max-model-len", "256", "--enforce-eager", "--json"]
    lines = {}
    for config in (None, '{"method": "ngram"}', '{"model": "demo-draft", "dtype": "float32"}'):
        assert main([*flags, *([] if config is None else ["--speculative-config", config])]) == 0
        lines[config] = json.loads(capsys.readouterr().out)["lines"]
    without, same, planned = lines.values()
    assert without.keys() == same.keys() and "companion" not in without
    draft = model.load(hub.resolve("demo-draft"), dtype="float32")
    options = {"memory": 6 << 30, "max_model_len": 256, "enforce_eager": True}
    built = Engine.build(model.load(hub.resolve("demo")), companion=draft, **options).built
    assert built is not None and built.account is not None
    for name in ("companion", "weights", "rows", "workspace", "sampling"):
        assert planned[name] == built.account.line(name).bytes, name
    assert main([*flags, "--speculative-config", '{"method": "eagle", "model": "demo-eagle"}']) == 2
    assert "not known before it is loaded" in capsys.readouterr().err
