"""The benchmarks count, time and judge rightly. Oracles: the figures of the performance page worked by hand, a scripted
server and a scripted peer whose answers are known, and transformers for the tokens of both sides."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from benchmarks import (
    client,
    floor,
    install_peers,
    machine,
    peer_llamacpp,
    peers,
    report,
    server,
    serving,
    shape,
    soak,
    startup,
    workloads,
)
from benchmarks import engine as in_process
from benchmarks.floor import Rates
from benchmarks.workloads import Measured, Prompts, Sizes, Timed

ROOT = Path(__file__).parent.parent
PAGE = Rates(read=46e9, matmul=900e9)
"""The rates that the published floors were worked out for."""


@pytest.fixture(scope="module")
def qwen():
    return shape.measure(ROOT / "benchmarks" / "configs" / "qwen3-0.6b", "bfloat16")


# --- floors -----------------------------------------------------------------------------------------------------------


def test_the_shape_has_the_published_sizes(qwen):
    form, vocab, longest = qwen
    # 28 layers of 2048+2x1024 rows of qkv, 2048 columns of o, 3 x 3072 of feed-forward, all of width 1024, and norms
    assert form.body == 28 * (1024 * (2048 + 2 * 1024) + 2048 * 1024 + 3 * 3072 * 1024 + 2 * 1024 + 2 * 128) + 1024
    assert form.head == 151936 * 1024
    assert (form.kv_token, form.attention, vocab, longest) == (114_688, 28 * 16 * 128, 151_936, 40_960)


@pytest.mark.parametrize(("rows", "milliseconds", "rate"), [(1, 26, 37), (8, 30, 213), (32, 58, 361)])
def test_decode_and_w1_floors_are_the_published_ones(qwen, rows, milliseconds, rate):
    form = qwen[0]
    assert floor.decode(form, rows, 192).seconds(PAGE) * 1e3 == pytest.approx(milliseconds, abs=0.6)
    least = floor.batch(form, rows, 128, 128).seconds(PAGE)
    assert rows * 128 / least == pytest.approx(rate, rel=0.01)


def test_w2_floor_is_the_published_one(qwen):
    # 2 x 0.44e9 x 512 / 900e9 = 501 ms, and 4 x 28 x 2048 x 512 x 512 / 2 / 900e9 = 33 ms of attention
    assert floor.batch(qwen[0], 1, 512, 1).seconds(PAGE) == pytest.approx(0.534, abs=0.002)


def test_a_prefix_is_computed_once_and_read_once_or_by_every_row(qwen):
    form = qwen[0]
    each, once = (floor.shared_prefix(form, 32, 512, 32, 32, read_once=r) for r in (False, True))
    assert each.prefill.weight_flops == 2 * form.body * (512 + 32 * 32)
    assert each.prefill.attention_flops == 4 * form.attention * (512**2 / 2 + 32 * (32**2 / 2 + 32 * 512))
    assert each.decode.kv_bytes == 32 * (512 + 32 + 16) * form.kv_token
    assert once.decode.kv_bytes == (512 + 32 * (32 + 16)) * form.kv_token
    assert once.seconds(PAGE) == pytest.approx(3.15, abs=0.05)


def test_attention_and_matmuls_follow_each_other():
    """A mutant that overlaps KV reads with matmuls gives 10 s here."""
    work = floor.Work(weight_bytes=4.0, weight_flops=10.0, kv_bytes=3.0, attention_flops=2.0)
    assert work.seconds(Rates(1.0, 1.0)) == 10 + 3 + 2
    assert max(work.bytes, work.flops) != work.seconds(Rates(1.0, 1.0))


# --- workloads --------------------------------------------------------------------------------------------------------


class Scripted:
    """A side that takes as long as it is told and remembers what it was asked."""

    def __init__(self, name, log, seconds=1.0):
        self.name, self.log, self.seconds = name, log, seconds

    def run(self, prompts, new):
        self.log.append((self.name, tuple(map(tuple, prompts)), new))
        return Timed(self.seconds + 0.5 * (new - 1), [[1] * new for _ in prompts])


def test_sides_take_turns_on_the_same_prompts():
    log = []
    a, b = workloads.w1(
        [Scripted("a", log), Scripted("b", log, 2.0)], Prompts(100), Sizes(prompt=4, new=5), rows=3, repeats=2
    )
    timed = log[2:]  # after a warm-up each
    assert [name for name, _, new in timed if new == 5] == ["a", "b", "a", "b"]
    asked = {s: [(p, n) for name, p, n in timed if name == s] for s in "ab"}
    assert asked["a"] == asked["b"]
    every = [p for prompts, _ in asked["a"] for p in prompts]
    assert len(set(every)) == len(every) == 12, "a prompt came twice, so a cache could have helped"
    assert (a.seconds, a.prefill) == ([3.0, 3.0], [1.0, 1.0])
    assert a.step_seconds == b.step_seconds == pytest.approx(0.5)
    assert a.output_rate == 15 / 3.0
    assert workloads.ratios(a, b) == [4 / 3, 4 / 3]


def test_w3_shares_its_prefix_and_nothing_else():
    log = []
    workloads.w3([Scripted("a", log)], Prompts(1000), Sizes(prefix=10, own=4, sharers=3, short=2), repeats=2)
    (_, first, _), (_, second, _) = log[1:]
    assert len({p[:10] for p in first}) == 1 and len({p[10:] for p in first}) == 3
    assert first[0][:10] != second[0][:10]


def test_a_short_answer_is_noticed():
    """The mutant of an engine that stops early must not be timed as a fast one."""

    class Early(Scripted):
        def run(self, prompts, new):
            return Timed(0.1, [[1] * max(1, new - 1) for _ in prompts])

    with pytest.raises(AssertionError, match="requests of 5 tokens wanted"):
        workloads.w1([Early("a", [])], Prompts(100), Sizes(prompt=4, new=5), rows=2, repeats=1)


def test_company_that_changes_tokens_is_noticed():
    class Depends(Scripted):
        def run(self, prompts, new):
            return Timed(0.1, [[sum(p) + len(prompts) // 4 * 1000] * new for p in prompts])

    sizes = Sizes(prompt=4, new=3)
    assert workloads.batched_equals_alone(Depends("a", []), Prompts(100), sizes, rows=3)
    assert not workloads.batched_equals_alone(Depends("a", []), Prompts(100), sizes, rows=8)


def test_percentiles_by_hand():
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert [workloads.percentile(values, q) for q in (0, 25, 50, 99, 100)] == [1, 2, 3, pytest.approx(4.96), 5]
    assert workloads.percentile([7.0], 99) == 7.0


def test_figures_by_hand(qwen):
    form = qwen[0]
    m = Measured("w1", "x", 1, 128, 128, seconds=[6.95, 7.0, 7.1], prefill=[0.25, 0.3, 0.26])
    f = report.figures(m, form, PAGE, Sizes())
    assert f["seconds"] == 7.0 and f["output_tokens_per_second"] == 128 / 7.0
    assert f["of_floor"] == pytest.approx(3.48 / 7.0, rel=0.01)
    assert f["decode"]["step_seconds"] == pytest.approx(6.7 / 127)
    assert f["decode"]["achieved_read"] == pytest.approx((1.192e9 + 192 * 114_688) * 127 / 6.7, rel=1e-3)
    assert f["prefill"]["achieved_flops"] == pytest.approx(2 * 0.4405e9 * 128 / 0.26, rel=0.03)
    assert len(report.row(f)) == len(report.HEAD)
    assert json.loads(json.dumps(f)) == f


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_a_made_tokenizer_has_every_token_and_reads_back(tmp_path):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(shape.made_tokenizer(4000)))
    assert backend.get_vocab_size() == 4000
    text = "Hello there, Zoë: 12 öre"
    assert backend.decode(backend.encode(text).ids) == text
    assert len(backend.encode("hello").ids) < 5, "letters merge"


def test_a_shape_without_weights_becomes_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("FNENGINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny").mkdir()
    config = json.loads((ROOT / "benchmarks" / "configs" / "qwen3-0.6b" / "config.json").read_text())
    config |= {"vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    folder, load_format = shape.prepare(str(tmp_path / "tiny"))
    assert load_format == "dummy" and (folder / "tokenizer.json").exists()
    assert shape.prepare(str(tmp_path / "tiny")) == (folder, "dummy")
    demo, as_is = shape.prepare("demo")
    assert as_is == "auto" and (demo / "model.safetensors").exists()


# --- peers ------------------------------------------------------------------------------------------------------------

PEER = """
import json, sys
print("chatter on stdout", flush=True)
print(json.dumps({"ready": True, "name": "toy", "same_weights": False}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["new"] == 13:
        sys.exit("thirteen is too much")
    print("more chatter", flush=True)
    print(json.dumps({"seconds": 0.5, "tokens": [[len(p)] * job["new"] for p in job["prompts"]]}), flush=True)
"""


SUBJECT = peers.Subject(Path("/models/x"), "bfloat16", threads=2, max_len=64, rows=4)


def state(pid: int) -> str | None:
    """`T` of a stopped process; None of one that is gone or a zombie."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
    return None if letter in "ZX" else letter


def soon(true, limit=10.0) -> bool:
    end = time.monotonic() + limit
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def test_a_peer_is_any_command_that_speaks_the_protocol(tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    command = f"{{python}} {tmp_path / 'peer.py'} --model {{model}}"
    peer = peers.start("toy", SUBJECT, command)
    try:
        assert peer.run([[1, 2, 3], [4]], 2) == Timed(0.5, [[3, 3], [1, 1]])
        assert peer.rss_bytes > 1 << 20
        with pytest.raises(peers.PeerError, match="thirteen is too much"):
            peer.run([[1]], 13)
    finally:
        peer.close()


def test_a_peer_and_its_children_compute_only_in_their_turns(tmp_path):
    """The peer's child counts as fast as it can; the counter stands still between turns."""
    count = tmp_path / "count"
    spin = f"import itertools\nfor i in itertools.count():\n    open({str(count)!r}, 'w').write(str(i))"
    (tmp_path / "peer.py").write_text(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {spin!r}])\n")
    with (tmp_path / "peer.py").open("a") as file:
        file.write("import time\n" + PEER.replace("job = json.loads(line)", "job = json.loads(line); time.sleep(0.3)"))
    peer = peers.start("toy", SUBJECT, f"{{python}} {tmp_path / 'peer.py'}")
    group = peer.group.process.pid
    everyone = [group, *(child.pid for child in psutil.Process(group).children())]

    def stopped() -> bool:
        return all(state(pid) == "T" for pid in everyone)

    try:
        assert len(everyone) == 2 and soon(stopped)
        seen = []
        for _ in range(2):
            peer.run([[1]], 1)
            assert soon(stopped)  # each process of a group takes the signal when it next runs
            before = count.stat().st_mtime_ns
            time.sleep(0.2)
            assert count.stat().st_mtime_ns == before, "a child went on in another side's turn"
            seen.append(before)
        assert seen[1] > seen[0]
    finally:
        peer.close()
    assert soon(lambda: not any(map(state, everyone))), "a child outlived its peer"


def test_a_killed_benchmark_leaves_no_stopped_peer(tmp_path):
    """What is stopped cannot end by itself; the system ends it because its group is orphaned."""
    (tmp_path / "peer.py").write_text(PEER)
    program = f"""
import os, signal
from pathlib import Path
from benchmarks import peers
peer = peers.start("toy", peers.Subject(Path("x"), "float32", 1, 64), "{{python}} {tmp_path / "peer.py"}")
print(peer.group.process.pid, flush=True)
signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as benchmark:
        assert benchmark.stdout is not None
        pid = int(benchmark.stdout.readline())
        assert soon(lambda: state(pid) == "T")
        benchmark.kill()
    assert soon(lambda: state(pid) is None)


def test_peers_that_are_not_here_say_what_installs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FNENGINE_PEERS", str(tmp_path))
    absent = peers.Peer("absent", "{python} -c pass", module="no_module_of_this_name")
    assert "no_module_of_this_name" in (peers.missing(absent) or "")
    assert peers.missing(peers.PEERS["transformers"]) is None
    for name in install_peers.INSTALLERS:
        peer = peers.PEERS[name]
        assert f"{tmp_path / name}: python -m benchmarks.install_peers {name}" in (peers.missing(peer) or "")
        (tmp_path / name).mkdir()
        (tmp_path / name / "installed.json").write_text("{}")
        assert peers.missing(peer) is None
    with pytest.raises(peers.PeerError, match="known: transformers"):
        peers.start("unheard-of", SUBJECT)
    assert [name for name, *_ in peers.listing()] == list(peers.PEERS)
    assert set(peers.PEERS) == {"transformers", *install_peers.INSTALLERS}


def test_peers_say_which_model_they_miss_and_what_they_cannot_round(tmp_path, monkeypatch):
    monkeypatch.setenv("FNENGINE_PEERS", str(tmp_path))
    vllm, openvino, llama = (peers.PEERS[name] for name in ("vllm", "openvino", "llama.cpp"))
    rounded = replace(SUBJECT, quantization="int4")
    assert "--quantization none only, not int4" in (peers.unfit(vllm, rounded) or "")
    assert peers.unfit(vllm, replace(SUBJECT, folder=tmp_path)) is None
    assert (peers.unfit(llama, rounded) or "").endswith(
        f"no {tmp_path}/models/x/q4_0.gguf: python -m benchmarks.peer_models llama.cpp --model /models/x "
        "--dtype bfloat16 --quantization int4"
    )
    assert [peers.ir(s).name for s in (SUBJECT, rounded)] == ["openvino-fp16", "openvino-int4"]
    assert [peers.gguf(replace(SUBJECT, dtype=d)).name for d in ("bfloat16", "float32")] == ["bf16.gguf", "f32.gguf"]
    peers.ir(SUBJECT).mkdir(parents=True)
    assert peers.unfit(openvino, SUBJECT) is None


def test_commands_are_filled_with_the_subject(tmp_path, monkeypatch):
    monkeypatch.setenv("FNENGINE_PEERS", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for peer in peers.PEERS.values():
        values = peers.places(peer, SUBJECT, port=9)
        for command in (peer.process, peer.server):
            words = peers.filled(command or "", values)
            assert not any("{" in word for word in words)
    vllm, llama = peers.PEERS["vllm"], peers.PEERS["llama.cpp"]
    words = peers.filled(vllm.server or "", peers.places(vllm, SUBJECT, port=9))
    assert words[0] == str(tmp_path / "vllm" / "bin" / "python")
    assert words[-4:] == ["--max-model-len", "64", "--max-num-seqs", "4"]
    assert words[words.index("--load-format") + 1] == "dummy" and words[words.index("--port") + 1] == "9"
    words = peers.filled(llama.server or "", peers.places(llama, SUBJECT, port=9))
    assert words[words.index("-c") + 1] == str(4 * 64), "llama-server divides its context among its slots"
    assert "OMP_NUM_THREADS" not in peers.surroundings(vllm, 2), "vLLM binds its threads itself"
    assert peers.surroundings(vllm, 2)["VLLM_CPU_OMP_THREADS_BIND"] == "0-1"
    assert peers.surroundings(llama, 2)["OMP_NUM_THREADS"] == "2"


def test_vllm_preloads_the_libraries_that_are_there(tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libiomp5.so").touch()
    assert peers.vllm_environment(tmp_path, 1)["LD_PRELOAD"] == str(tmp_path / "lib" / "libiomp5.so")
    deep = tmp_path / "tcmalloc" / "usr" / "lib" / "libtcmalloc_minimal.so.4"
    deep.parent.mkdir(parents=True)
    deep.touch()
    assert peers.vllm_environment(tmp_path, 1)["LD_PRELOAD"] == f"{deep}:{tmp_path / 'lib' / 'libiomp5.so'}"


def test_what_peers_import_of_ours_is_there_in_a_bare_python():
    """Their environments have neither torch nor psutil of ours; -S hides every installed package."""
    modules = "benchmarks.peers, benchmarks.peer_vllm, benchmarks.peer_openvino, benchmarks.peer_llamacpp"
    done = subprocess.run([sys.executable, "-S", "-c", f"import {modules}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_installing_stops_where_a_needed_command_fails(tmp_path, capsys):
    fails = (sys.executable, "-c", "import sys; sys.exit(3)")
    install_peers.run(install_peers.Command(fails, tmp_path / "new", needed=False))
    install_peers.run(install_peers.Command(("no-such-program",), tmp_path, needed=False))
    assert capsys.readouterr().out.count("went on without it") == 2
    with pytest.raises(subprocess.CalledProcessError):
        install_peers.run(install_peers.Command(fails, tmp_path))


class Llama:
    """llama.cpp's C functions over a model whose next token is the sum of the sequence so far, modulo 50.

    Each sequence has a cache, as the real one; a token at a position that does not follow its cache is refused.
    """

    def __init__(self, rows):
        self.kv: list[list[int]] = [[] for _ in range(rows)]
        self.computed = 0

    def llama_memory_clear(self, memory, data):
        self.kv = [[] for _ in self.kv]

    def llama_memory_seq_cp(self, memory, source, target, first, last):
        assert (first, last) == (-1, -1), "caches apart are copied whole"
        self.kv[target] = list(self.kv[source])

    def llama_decode(self, context, batch):
        self.found = {}
        for i in range(batch.n_tokens):
            kv = self.kv[batch.seq_id[i][0]]
            assert batch.pos[i] == len(kv) and batch.n_seq_id[i] == 1
            kv.append(batch.token[i])
            self.computed += 1
            if batch.logits[i]:
                self.found[i] = (ctypes.c_float * 50)(*(t == sum(kv) % 50 for t in range(50)))
        return 0

    def llama_get_logits_ith(self, context, i):
        return self.found[i]


@pytest.mark.parametrize("batch", [3, 100])
@pytest.mark.parametrize("prompts", [[[1, 2, 3]], [[1, 2, 3], [4, 5, 6, 7]], [[9, 9, 1, 2], [9, 9, 3], [9, 9, 1]]])
def test_the_adapter_of_llama_cpp_keeps_its_books(monkeypatch, batch, prompts):
    """Oracle: the model by hand. A common prefix is computed once, whatever is cut into batches."""
    import numpy as np

    monkeypatch.setattr(peer_llamacpp, "BATCH", batch)
    one = peer_llamacpp.Sequences.__new__(peer_llamacpp.Sequences)
    one.lib, one.np, one.vocab, one.memory, one.context = Llama(len(prompts)), np, 50, None, None
    arrays = {k: [0] * batch for k in ("token", "pos", "n_seq_id", "logits")}
    one.batch = SimpleNamespace(n_tokens=0, seq_id=[[0] for _ in range(batch)], **arrays)
    for new in (1, 4):
        wanted = [list(p) for p in prompts]
        for p in wanted:
            for _ in range(new):
                p.append(sum(p) % 50)
        one.lib.computed = 0
        assert one.generate(prompts, new) == [p[-new:] for p in wanted]
        shared = {1: 0, 2: 0, 3: 2}[len(prompts)]
        assert one.lib.computed == sum(map(len, prompts)) - shared * (len(prompts) - 1) + len(prompts) * (new - 1)


def test_peers_may_be_named_together_or_apart():
    named = in_process.arguments(["--peer", "vllm,openvino", "--peer", "llama.cpp", "--concurrency", "1,2"])
    assert named.peer == ["vllm", "openvino", "llama.cpp"] and named.concurrency == [1, 2]
    assert serving.arguments(["--peer", "all"]).peer == list(peers.PEERS)
    assert serving.serve_flags(serving.arguments(["--quantization", "int8"])) == ["--quantization", "int8"]


def test_rounded_weights_have_a_floor_of_their_bytes():
    """Oracle: the bytes of codes and scales that the kernels' layout has for the shape's products."""
    from fnengine.kernels import quantized

    folder = ROOT / "benchmarks" / "configs" / "qwen3-0.6b"
    products = ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072))
    for name, bits in (("int8", 8), ("int4", 4)):
        form = shape.measure(folder, "bfloat16", name)[0]
        sizes = [quantized.shapes(n, k, bits) for n, k in products]
        held = sum(math.prod(codes) + 2 * math.prod(scales) for codes, scales in sizes)
        assert held / sum(n * k for n, k in products) == form.itemsize
        codes, scales = quantized.shapes(151936, 1024, 8)
        assert (math.prod(codes) + 2 * math.prod(scales)) / form.head == form.head_itemsize
    whole = shape.measure(folder, "bfloat16")[0]
    assert floor.decode(form, 1, 0).bytes == form.body * form.itemsize + form.head * form.head_itemsize
    assert whole.itemsize == whole.head_itemsize == 2


# --- the client -------------------------------------------------------------------------------------------------------


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(text="", ids=None, finish=None, **more) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish} | ({} if ids is None else {"token_ids": ids})
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


END = b"data: [DONE]\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}\n\n'
WHOLE = [event("a", [1]), event("bc", [2, 3]), event("", [4], "length"), USAGE, END]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"


def answer_of(pieces, head=HEAD, pause=0.0, complete=True, **options):
    """What the client makes of a server that sends these pieces, each as one chunk."""

    async def main():
        over = asyncio.Event()

        async def on_connection(reader, writer):
            with contextlib.suppress(OSError):
                await reader.readuntil(b"\r\n\r\n")
                writer.write(head)
                for piece in pieces:
                    writer.write(chunk(piece) if b"chunked" in head else piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
                if b"chunked" in head and complete:
                    writer.write(b"0\r\n\r\n")
                    await writer.drain()
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            over.set()

        listening = await asyncio.start_server(on_connection, "127.0.0.1", 0)
        port = listening.sockets[0].getsockname()[1]
        x = await client.exchange(f"http://127.0.0.1:{port}", client.body_of([1, 2, 3], 4), **options)
        await over.wait()
        listening.close()
        await listening.wait_closed()
        return x

    x = asyncio.run(main())
    return x, client.read(x)


def test_the_client_reads_a_stream_however_it_is_cut_into_chunks():
    one = b"".join(WHOLE)
    for pieces in (WHOLE, [one], [one[i : i + 7] for i in range(0, len(one), 7)]):
        x, a = answer_of(pieces)
        assert (a.error, a.text, a.tokens, a.counts) == (None, "abc", [1, 2, 3, 4], [1, 2, 1])
        assert (a.finish, a.produced, x.done) == ("length", 4, True)


def test_the_client_times_events_as_they_come():
    _, a = answer_of(WHOLE, pause=0.05)
    assert a.first is not None and a.first < 0.05
    assert len(a.gaps) == 2 and all(0.04 < g < 0.5 for g in a.gaps)


@pytest.mark.parametrize(
    ("pieces", "options", "error"),
    [
        (WHOLE[:-1], {}, "without [DONE]"),
        ([WHOLE[0], END], {}, "without a finish reason"),
        ([WHOLE[0], b'data: {"error":{"message":"boom"}}\n\n', END], {}, "boom"),
        ([b"data: {broken\n\n", *WHOLE], {}, "no JSON"),
        (WHOLE[:2], {"complete": False}, "IncompleteReadError"),
        ([b'{"error":{"message":"too long"}}'], {"head": b"HTTP/1.1 400 Bad Request\r\n\r\n"}, "status 400: {"),
    ],
)
def test_the_client_takes_nothing_broken_for_an_answer(pieces, options, error):
    _, a = answer_of(pieces, **options)
    assert a.error is not None and error in a.error


@pytest.mark.parametrize("abrupt", [False, True])
def test_a_client_that_leaves_is_gone_and_no_error(abrupt):
    x, a = answer_of(WHOLE, cut_after=2, abrupt=abrupt)
    assert x.cut and a.error is None and a.tokens == [1, 2, 3]


def test_a_server_that_stalls_is_given_up():
    _, a = answer_of(WHOLE[:2], pause=0.4, limit=0.2)
    assert a.error == "no end within 0.2 s" and a.tokens == [1]


# --- the soak ---------------------------------------------------------------------------------------------------------

CLEAN = """# HELP fnengine:num_requests_running x
fnengine:num_requests_running{engine="0",model_name="demo"} 0.0
fnengine:num_requests_waiting{engine="0",model_name="demo"} 0.0
fnengine:kv_cache_usage_perc{engine="0",model_name="demo"} 0.0
fnengine:kv_blocks_held{engine="0",model_name="demo"} 0.0
fnengine:request_success_total{engine="0",finished_reason="length",model_name="demo"} 41.0
fnengine:request_success_total{engine="0",finished_reason="error",model_name="demo"} 0.0
"""


def test_what_the_server_still_holds_is_read_from_its_metrics():
    assert soak.leaks(server.metrics(CLEAN)) == []
    held = CLEAN.replace('kv_blocks_held{engine="0",model_name="demo"} 0.0', 'kv_blocks_held{engine="0"} 3.0')
    assert soak.leaks(server.metrics(held)) == ["kv_blocks_held is 3"]
    failed = CLEAN.replace('"error",model_name="demo"} 0.0', '"error",model_name="demo"} 2.0')
    assert soak.leaks(server.metrics(failed)) == ["2 requests ended with an error"]
    assert len(soak.leaks({})) == 5, "a server without these metrics must not pass"


def test_flat_memory_is_told_from_growing_memory():
    flat = [(t / 2, 500_000_000 + 1_000_000 * (t % 5)) for t in range(240)]
    warming = [(t / 2, 500_000_000 + (0 if t > 50 else -200_000_000)) for t in range(240)]
    growing = [(t / 2, 500_000_000 + 400_000 * t) for t in range(240)]
    growth = [soak.flatness(s)["growth"] for s in (flat, warming, growing)]
    assert abs(growth[0]) < 0.01 and growth[1] == 0
    # by hand: medians at samples 89.5 and 209.5 or so, 48 MB apart, over 536 MB
    assert growth[2] == pytest.approx(0.0895, abs=0.002)
    assert soak.flatness(flat[:5]) is None


def test_the_verdict_fails_for_each_thing_that_can_go_wrong():
    flat = {"growth": 0.0}
    good = soak.Tally(finished=5, canary=1)
    assert soak.verdict(good, [], flat, 0.02) == []
    bad = soak.Tally(finished=5, canary=1, errors=Counter({"boom": 2}))
    assert soak.verdict(bad, [], flat, 0.02) == ["2 x boom"]
    for wrong in (
        soak.verdict(good, ["kv_blocks_held is 3"], flat, 0.02),
        soak.verdict(good, [], {"growth": 0.03}, 0.02),
        soak.verdict(good, [], None, 0.02),
        soak.verdict(good, [], flat, 0.02, exit_code=-9),
        soak.verdict(soak.Tally(canary=1), [], flat, 0.02),
        soak.verdict(soak.Tally(finished=5), [], flat, 0.02),
    ):
        assert len(wrong) == 1


def test_drawn_requests_fit_the_context_and_repeat_with_the_seed():
    import random

    drawn = [[soak.draw(random.Random(s), 100, 64) for _ in range(1)] for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    rng = random.Random(0)
    many = [soak.draw(rng, 100, 64) for _ in range(500)]
    assert all(p.prompt and len(p.prompt) + p.new <= 64 for p in many)
    assert 0.2 < sum(p.cut_after is not None for p in many) / 500 < 0.4


def test_only_this_machine_is_soaked():
    with pytest.raises(SystemExit):
        soak.arguments(["--url", "http://192.0.2.1:8000"])


def test_the_load_counts_every_request_once_and_its_canary_notices_a_changed_text():
    """Against a server that answers by the book, and one whose text depends on how many requests it has seen."""
    for drift in (False, True):
        seen: Counter[str] = Counter()

        class Book(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                n = body["max_tokens"]
                seen["requests"] += 1  # noqa: B023
                first = seen["requests"] if drift else 1  # noqa: B023
                usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": n}
                data = event("a", [first, *range(1, n)], "length") + event("")
                data += b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n" + END
                with contextlib.suppress(OSError):
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
                    self.wfile.write(data)
                self.close_connection = True

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, *_):
                pass  # a client that resets its connection is part of the test

        with Quiet(("127.0.0.1", 0), Book) as listening:
            thread = threading.Thread(target=listening.serve_forever, daemon=True)
            thread.start()
            url = f"http://127.0.0.1:{listening.server_address[1]}"
            tally = asyncio.run(soak.load(url, clients=3, seconds=1.5, seed=0, vocab=50, longest=64))
            listening.shutdown()
            thread.join()
        assert tally.finished > 3 and tally.cut > 0 and tally.canary >= 1
        wrong = {"canary: other tokens than when alone"} if drift else set()
        assert set(tally.errors) == wrong
        assert tally.finished + tally.cut + tally.ended + tally.canary + 1 >= seen["requests"]


# --- starts and processes ---------------------------------------------------------------------------------------------


def test_cold_starts_have_empty_caches_and_warm_ones_theirs():
    found = []

    def start(cache: Path) -> dict[str, float]:
        found.append(sorted(p.name for p in cache.iterdir()))
        (cache / "artifact").touch()
        return {"first_token": float(len(found))}

    out = startup.cold_and_warm(start, 2)
    assert found == [[], ["artifact"], [], ["artifact"]]
    assert out == {
        "cold": [{"first_token": 1.0}, {"first_token": 3.0}],
        "warm": [{"first_token": n} for n in (2.0, 4.0)],
    }
    text = startup.table([{"model": "demo", **out}])
    assert "cold" in text and "2.00" in text and "3.00" in text


def test_a_start_has_its_caches_in_one_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/somewhere/warm")
    env = startup.environment_for(tmp_path, 2)
    assert "TORCHINDUCTOR_CACHE_DIR" not in env and env["FNENGINE_CACHE"] == str(tmp_path)


def test_a_server_that_ends_or_keeps_silent_is_reported(monkeypatch):
    with pytest.raises(server.ServerError, match="ended with 3: no such model"):
        server.Server([sys.executable, "-c", "import sys; print('no such model'); sys.exit(3)"]).__enter__()
    monkeypatch.setattr(server, "START_LIMIT", 0.2)
    silent = server.Server([sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(server.ServerError, match="not up after"):
        silent.__enter__()
    assert silent.exit_code == -signal.SIGTERM


def test_others_who_compute_are_seen_and_own_children_are_not():
    """Oracle: one process spins for the time measured, so it takes one core's worth of the machine's time."""
    spin = "import time; e = time.monotonic() + 1.0\nwhile time.monotonic() < e: pass"
    before, start = machine.Others(), time.monotonic()
    subprocess.run([sys.executable, "-c", spin], check=True)
    wall = (time.monotonic() - start) * (os.cpu_count() or 1)
    spun = machine._own() - before.own
    assert 0.3 < spun < 3, "the child's time counts as our own"
    assert 0 <= before.share() <= 1 and spun < wall


def test_facts_name_commit_and_versions():
    facts = machine.facts(2)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert facts["commit"].startswith(head.stdout[:12])
    assert facts["versions"]["torch"] and facts["threads"] == 2


# --- whole runs -------------------------------------------------------------------------------------------------------


def test_the_engine_benchmark_runs_beside_transformers_and_they_agree(tmp_path, capsys, monkeypatch):
    """Oracle: transformers on the bundled model's weights in float32 gives the same greedy tokens."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(machine, "measure_apart", lambda *a, **k: {"read": 1e10, "matmul": 1e11})
    monkeypatch.setenv("FNENGINE_PEERS", str(tmp_path))  # where nothing is installed
    for name in ("FNENGINE_THREADS", "OMP_NUM_THREADS"):  # --threads sets them; afterwards they are as before
        monkeypatch.setenv(name, "1")
    target = tmp_path / "deep" / "out.json"
    flags = "--model demo --dtype float32 --workload w1,w2,w3 --concurrency 3 --repeats 1 --divide 32 --threads 1"
    code = in_process.main([*flags.split(), "--enforce-eager", "--peer", "transformers,vllm", "--json", str(target)])
    printed = capsys.readouterr().out
    out = json.loads(target.read_text())
    assert code == 0
    assert {(r["workload"], r["side"]) for r in out["results"]} == {
        (w, s) for w in ("w1", "w2", "w3") for s in ("fnengine", "transformers")
    }
    assert [len(r["whole"]) for r in out["ratios"]] == [1, 1, 1]
    assert out["checks"] == {in_process.COMPANY: True, "requests with the tokens of transformers": 1.0}
    assert "% of floor" in printed and "commit" in printed and "tokens among others equal tokens alone: True" in printed
    assert f"peer missing: vllm: not installed in {tmp_path / 'vllm'}: python -m benchmarks.install_peers" in printed


def served(monkeypatch, flags: str, out: Path, shift: int = 0) -> int:
    """`benchmarks.serving` against a server that sends tokens 20 ms apart, to whom names a strategy other ones."""

    class Slow(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            n = body["max_tokens"]
            for i in range(n):
                time.sleep(0.02)
                token = i + (shift if "strategy" in body else 0)
                self.wfile.write(event("a", [token], "length" if i == n - 1 else None))
            self.wfile.write(END)
            self.close_connection = True

        def log_message(self, *_):
            pass

    monkeypatch.setattr(machine, "measure_apart", lambda *a, **k: {"read": 1e10, "matmul": 1e11})
    with ThreadingHTTPServer(("127.0.0.1", 0), Slow) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.server_address[1]}"
        code = serving.main([*f"--model demo --url {url} --workload w1 {flags}".split(), "--json", str(out)])
        listening.shutdown()
        thread.join()
    return code


@pytest.mark.parametrize("shift", [0, 1])
def test_serving_compares_a_strategy_with_plain_requests(monkeypatch, capsys, tmp_path, shift):
    """Law: `sample` gives the tokens of plain requests; another token is exit status 1."""
    out = tmp_path / "out.json"
    code = served(monkeypatch, "--strategy sample --concurrency 2 --repeats 1 --divide 32", out, shift)
    assert code == shift and ("WRONG" in capsys.readouterr().out) == bool(shift)
    found = json.loads(out.read_text())
    assert [r["side"] for r in found["results"]] == ["fnengine", "strategy sample"] and len(found["ratios"]) == 1


def test_serving_takes_a_running_server_and_reports_percentiles(monkeypatch, capsys, tmp_path):
    """Against a server that sends 3 tokens 20 ms apart: known gaps."""
    code = served(monkeypatch, "--concurrency 2 --repeats 2 --divide 32", tmp_path / "out.json")
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    seen = result["latency"]
    assert code == 0 and seen["requests"] == 4 and seen["tokens_an_event"] == 1
    assert 0.019 < seen["ttft_p50"] < 0.5 and 0.019 < seen["itl_p50"] < 0.5 and seen["itl_p50"] <= seen["itl_p99"]
    assert "ITL p50 ms" in capsys.readouterr().out
