"""The command line: words to options, mistakes to one line, and commands that do what the functional API does."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fnengine import cli
from fnengine.cli import chat, files, flags, refused, serve
from fnengine.cli.client import Server, ServerError
from fnengine.config import ModelOptions, ServeOptions, overrides, resolve, table
from fnengine.errors import ConfigError
from fnengine.kernels import describe
from fnengine.settings import MODES, Settings

ROOT = Path(__file__).parent.parent
KNOWN = [name for f in flags.FLAGS for name in f.names]


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    """No test sees the caller's variables, nor leaves its own."""
    for name in ("FNENGINE_API_KEY", "FNENGINE_THREADS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def options(*words: str, command: str = "serve"):
    return resolve(cli.parser().parse_args(refused.refuse([command, *words], KNOWN)))


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),  # worked by hand: small letters are powers of 1000, capitals and iB of 1024
    [
        ("4096", 4096),
        ("32K", 32768),
        ("32k", 32000),
        ("25.6k", 25600),
        ("1.5M", 1572864),
        ("8GiB", 8589934592),
        ("8GB", 8000000000),
        ("2T", 2199023255552),
    ],
)
def test_sizes_as_people_write_them(text, value):
    assert flags.read_size(text) == value
    assert options("--kv-cache-memory-bytes", text).engine.kv_cache_memory_bytes == value


@pytest.mark.parametrize("text", ["", "K", "1.5", "-1", "1e3", "8Gb", "32 x", "0x10", "1.0001k"])
def test_sizes_that_are_none(text):
    with pytest.raises(ConfigError, match="--kv-cache-memory-bytes"):
        options(f"--kv-cache-memory-bytes={text}")


def test_every_flag_reaches_a_field_and_every_field_has_a_flag():
    """Law: nothing that is accepted is swallowed. Oracle: the option classes' own fields."""
    homes = {"model": ModelOptions, "engine": Settings, "serve": ServeOptions}
    reached = {tuple(f.to.split(".")) for f in flags.FLAGS if "." in f.to}
    fields = {(part, f.name) for part, kind in homes.items() for f in dataclasses.fields(kind)}
    assert reached == fields - {("model", "model")}
    apart = {"--block-size", "--threads", "--disable-log-requests", "--config"}
    assert {f.name for f in flags.FLAGS if "." not in f.to} == apart


@pytest.mark.parametrize("flag", flags.FLAGS, ids=lambda f: f.name)
def test_a_given_flag_is_seen_and_says_so(flag):
    """A value that differs from the default arrives, with its origin; everything else keeps its default."""
    special = {
        "--max-model-len": "77",
        "--block-size": "16",
        "--ssl-keyfile": "k.pem",
        "--ssl-certfile": "c.pem",
        "--enable-prefix-caching": None,
        "--enable-chunked-prefill": None,
        "--enable-auto-tool-choice": None,
        "--tool-call-parser": "hermes",
        "--reasoning-parser": "qwen3",
        "--speculative-config": '{"method": "ngram"}',
        "--override-generation-config": '{"top_k": 3}',
    }
    name = flag.name.replace("--enable-", "--no-enable-") if flag.name in special and not flag.read else flag.name
    value = special.get(flag.name, flag.choices[-1] if flag.choices else "3")
    if flag.name == "--uvicorn-log-level":
        value = "debug"
    words = [name] if flag.read is None else [name, value]
    pair = {"--ssl-keyfile": ["--ssl-certfile", "c"], "--ssl-certfile": ["--ssl-keyfile", "k"]}.get(flag.name, [])
    before, after = (dict((r[0], r[1:]) for r in table(options(*w))) for w in ([], [*words, *pair]))
    changed = {n for n in before if before[n] != after[n]} - set(pair)
    assert changed == (set() if flag.to == "-" else {flag.name})
    if changed:
        assert after[flag.name][1] == "command line"


def test_underscores_negation_several_values_and_json_lists():
    o = options("--max_model_len=1K", "--no-enable-prefix-caching", "--api-key", "a", "b", "--api-key", "c")
    assert (o.engine.max_model_len, o.engine.enable_prefix_caching) == (1024, False)
    assert o.serve.api_key == ("a", "b", "c")
    assert options("--allowed-origins", '["http://a", "*"]').serve.allowed_origins == ("http://a", "*")
    assert options("--max-model-len", "auto").engine.max_model_len is None
    assert options("--max-logprobs", "-1").engine.max_logprobs == -1
    assert options("--dtype", "half").model.dtype == "float16"


def test_the_model_may_be_named_in_two_ways_but_not_twice():
    assert options("some/name").model.model == options("--model", "some/name").model.model == "some/name"
    with pytest.raises(ConfigError, match=r"--model.*a.*b"):
        options("a", "--model", "b")


def test_keys_come_from_the_environment_unless_given_and_are_never_shown(monkeypatch):
    monkeypatch.setenv("FNENGINE_API_KEY", "hush,hush2")
    assert options().serve.api_key == ("hush", "hush2")
    assert options("--api-key", "own").serve.api_key == ("own",)
    shown = {row[0]: row[1:] for row in table(options())}
    assert shown["--api-key"] == ("2 set", "FNENGINE_API_KEY")


def test_threads_are_set_before_torch_can_see_them(monkeypatch):
    import os

    assert options("--threads", "3").threads == 3
    assert os.environ["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("FNENGINE_THREADS", "5")
    o = options()
    assert (o.threads, o.origins["--threads"]) == (5, "FNENGINE_THREADS")


@pytest.mark.parametrize("mode", sorted({m for _, m in MODES}))
def test_performance_modes_are_those_of_the_table(mode):
    o = options("--performance-mode", mode)
    assert o.engine.mode("cpu") == MODES["cpu", mode]


# --- refusals ---------------------------------------------------------------------------------------------------------

_TYPED = """--model --tokenizer --served-model-name --host --port --uds --api-key --dtype --max-model-len
--gpu-memory-utilization --kv-cache-memory-bytes --kv-cache-dtype --block-size --max-num-seqs --max-num-batched-tokens
--enable-prefix-caching --no-enable-prefix-caching --enable-chunked-prefill --scheduling-policy --async-scheduling
--performance-mode --tensor-parallel-size -tp --pipeline-parallel-size -pp --data-parallel-size -dp --quantization
--load-format --revision --trust-remote-code --seed --enforce-eager --compilation-config -cc --cudagraph-capture-sizes
--speculative-config --structured-outputs-config --enable-lora --lora-modules --max-loras --max-lora-rank
--chat-template --chat-template-content-format --response-role --enable-auto-tool-choice --tool-call-parser
--reasoning-parser --generation-config --override-generation-config --max-logprobs --logprobs-mode --logits-processors
--return-tokens-as-token-ids --enable-prompt-tokens-details --enable-force-include-usage --enable-per-request-metrics
--stream-interval --disable-log-stats --disable-log-requests --uvicorn-log-level --root-path --middleware
--allowed-origins --ssl-keyfile --ssl-certfile --ssl-ca-certs --otlp-traces-endpoint --shutdown-timeout
--config"""
PEOPLE_TYPE = _TYPED.split()
"""What users of vLLM type."""


def accepted() -> set[str]:
    """Every flag that `serve` takes."""
    actions = cli.parser()._subparsers._group_actions[0].choices["serve"]._actions
    return {name for a in actions for name in a.option_strings}


@pytest.mark.parametrize("name", PEOPLE_TYPE)
def test_a_flag_that_people_type_is_taken_or_refused_by_name(name):
    if name in accepted():
        return
    with pytest.raises(ConfigError) as e:
        options("model", name, "nonsense")
    assert e.value.where == name
    assert e.value.remedy
    assert "no such flag" not in e.value.what, f"{name} is unknown, not refused with a reason"


def test_logging_cannot_be_on_and_off():
    assert not options("--disable-log-requests").serve.enable_log_requests
    assert options("--enable-log-requests").serve.enable_log_requests
    with pytest.raises(ConfigError, match="--disable-log-requests"):
        options("--enable-log-requests", "--disable-log-requests")


def test_refused_names_are_not_accepted_ones():
    assert not accepted() & set(refused.REFUSED)


@pytest.mark.parametrize("words", [["-tp", "1"], ["--tensor-parallel-size=1"], ["--kv-cache-dtype", "auto"]])
def test_values_that_say_what_is_done_anyway_pass(words):
    assert options("m", *words).model.model == "m"
    with pytest.raises(ConfigError):
        options("m", words[0].partition("=")[0], "2")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["serve", "--prot", "1"], r"--prot: .*did you mean --port"),
        (["serve", "--port"], r"--port: expected one argument"),
        (["serve", "--port", "x"], r"--port: .*'x'"),
        (["serve", "--dtype", "int8"], r"--dtype: .*int8.*bfloat16"),
        (["serve", "--block-size", "32"], r"--block-size: .*16"),
        (["serve", "a", "b"], r"b: one word too many"),
        (["serve", "--ssl-keyfile", "k"], r"--ssl-certfile: TLS needs"),
        (["serve", "--stream-interval", "0"], r"--stream-interval"),
        (["serve", "--shutdown-timeout", "-1"], r"--shutdown-timeout"),
        (["serve", "--request-timeout", "-1"], r"--request-timeout"),
        (["serve", "--config", "/no/f.yaml"], r"--config: cannot read /no/f.yaml"),
        (["serve", "--config"], r"--config: expected a file"),
        (["serve", "--override-generation-config", '{"top": 1}', "demo"], r"--override-.*'top' is no sampling default"),
        (["sreve"], r"COMMAND: .*'sreve'"),
        (["bench"], r"KIND"),
        (["complete", ""], r"PROMPT: the prompt is empty"),
        (["chat", "--url", "nonsense"], r"--url: 'nonsense' is no URL"),
        (["complete", "x", "--model", "/no/such/folder"], r"/no/such/folder: no such directory"),
    ],
)
def test_mistakes_are_one_line_and_code_2(words, says, capsys):
    assert cli.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("fnengine: error: ")
    assert re.search(says, err), err


@pytest.mark.parametrize(
    ("raised", "code"), [(ConfigError("wrong"), 2), (KeyboardInterrupt(), 130), (RuntimeError("bug"), 1)]
)
def test_exit_codes_and_debug(raised, code, monkeypatch, capsys):
    def run(args):
        raise raised

    monkeypatch.setattr(serve, "run", run)
    assert cli.main(["serve"]) == code
    assert "Traceback" not in capsys.readouterr().err
    if code != 130:
        with pytest.raises(type(raised)):
            cli.main(["serve", "--debug"])


def test_a_port_in_use_is_known_before_the_model_is_loaded(monkeypatch, capsys):
    from fnengine.cli import start
    from fnengine.serve.run import bind

    monkeypatch.setattr(start, "load_model", lambda options: pytest.fail("the model was loaded first"))
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    assert re.search(rf"--port: port {port} .*in use", capsys.readouterr().err)


# --- quick and light --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["serve", "--help"], ["bench", "serve", "--help"]])
def test_help_and_version_load_nothing_heavy(words):
    code = (
        "import sys\nfrom fnengine.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'numpy', 'fastapi', 'uvicorn', 'transformers', 'asyncio'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "fnengine" in done.stdout


def test_python_dash_m_is_the_same_program():
    done = subprocess.run(
        [sys.executable, "-m", "fnengine", "serve", "--no-such"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fnengine: error: --no-such: ")


def test_show_config_prints_every_option_with_its_origin(capsys):
    assert cli.main(["serve", "demo", "--show-config", "--port", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [row[0] for row in table(options())]
    assert any(re.fullmatch(r"--port +1 +command line", line) for line in lines)
    assert any(re.fullmatch(r"--host +127.0.0.1 +default", line) for line in lines)


# --- conversations ----------------------------------------------------------------------------------------------------


class Parrot:
    """Answers with the number of messages and the last one; remembers what it was given."""

    def __init__(self, fail: type[BaseException] | None = None):
        self.given, self.fail = [], fail

    def __call__(self, messages):
        self.given.append([dict(m) for m in messages])
        yield f"{len(messages)}:"
        if self.fail is not None:
            fail, self.fail = self.fail, None
            raise fail("broken")
        yield messages[-1]["content"]


def say(monkeypatch, capsys, parrot, *lines, system=None):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    chat.converse(parrot, system, tty=False)
    return capsys.readouterr()


def test_a_conversation_grows_and_starts_again(monkeypatch, capsys):
    parrot = Parrot()
    lines = ["one", "", "two", "/reset", "three", "/system Be brief.", "four", "/exit", "five"]
    out = say(monkeypatch, capsys, parrot, *lines, system="S").out
    assert out == "2:one\n4:two\n2:three\n2:four\n"
    assert [m["role"] for m in parrot.given[1]] == ["system", "user", "assistant", "user"]
    assert parrot.given[1][2]["content"] == "2:one"
    assert parrot.given[2][0]["content"] == "S"
    assert parrot.given[3][0]["content"] == "Be brief."


def test_a_failed_answer_is_not_part_of_the_conversation(monkeypatch, capsys):
    said = say(monkeypatch, capsys, parrot := Parrot(fail=ServerError), "one", "two")
    assert "fnengine: error: broken" in said.err
    assert parrot.given[1] == [{"role": "user", "content": "two"}]


def test_an_interrupted_answer_is_kept_as_far_as_it_came(monkeypatch, capsys):
    say(monkeypatch, capsys, parrot := Parrot(fail=KeyboardInterrupt), "one", "two")
    assert [m["content"] for m in parrot.given[1]] == ["one", "1:", "two"]


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scripted():
    """(serve, url): `serve(status, body)` is what a real HTTP server answers next."""
    answers, seen = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            length = int(self.headers["content-length"])
            seen.append((self.path, dict(self.headers.items()), json.loads(self.rfile.read(length))))
            status, body = answers.pop(0)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield answers, seen, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join(10)


def test_events_are_read_to_the_end_mark(scripted):
    answers, seen, url = scripted
    answers.append(
        (200, b': keep-alive\n\ndata: {"a": 1}\n\ndata: {"a": "\xc3\xa4"}\n\ndata: [DONE]\n\ndata: {"a": 9}\n\n')
    )
    assert list(Server(url + "/v1/", "k").events("/v1/completions", {"n": 1})) == [{"a": 1}, {"a": "ä"}]
    path, headers, body = seen[0]
    assert (path, body) == ("/v1/completions", {"n": 1, "stream": True})
    assert {k.lower(): v for k, v in headers.items()}["authorization"] == "Bearer k"


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (200, b'data: {"a": 1}\n\n', "broke off"),
        (200, b'data: {"a": 1}\n\ndata: {"error": {"message": "no more"}}\n\ndata: [DONE]\n\n', "no more"),
        (200, b'data: {"a": 1}\n\ndata: {"b', "broke off"),
        (404, b'{"error": {"message": "no such model"}}', "404: no such model"),
        (502, b"<html>bad gateway</html>", "502: <html>"),
    ],
)
def test_a_failing_server_is_quoted(scripted, status, body, says):
    answers, _, url = scripted
    answers.append((status, body))
    with pytest.raises(ServerError, match=says):
        list(Server(url).events("/v1/completions", {}))


def test_no_server_is_a_users_mistake(capsys):
    from fnengine.serve.run import bind

    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
    assert cli.main(["complete", "x", "--url", f"http://127.0.0.1:{port}"]) == 2
    assert "no server answers" in capsys.readouterr().err


# --- with the bundled model -------------------------------------------------------------------------------------------

SMALL = ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "4"]


@pytest.fixture(scope="module")
def llm():
    import fnengine as fn

    return fn.LLM("demo", enforce_eager=True, max_model_len=128, max_num_seqs=4)


def test_complete_prints_what_the_functional_api_says(llm, capsys):
    """Oracle: LLM.generate, greedy."""
    import fnengine as fn

    words = ["complete", "Once upon a time", "--temperature", "0", "--max-tokens", "12", *SMALL]
    assert cli.main(words) == 0
    wanted = llm.generate("Once upon a time", fn.Sampling(temperature=0), fn.Stop(max_tokens=12))[0].text
    assert capsys.readouterr().out == wanted + "\n"


def test_chat_prints_what_the_functional_api_says(llm, monkeypatch, capsys):
    """Oracle: LLM.chat, greedy, over two turns; the template is the one asked for."""
    import fnengine as fn

    greedy = fn.Sampling(temperature=0)
    messages = [{"role": "user", "content": "Hello!"}]
    first = llm.chat(messages, greedy, fn.Stop(max_tokens=30))[0].text
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "Who are you?"}]
    second = llm.chat(messages, greedy, fn.Stop(max_tokens=30))[0].text
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello!\nWho are you?\n"))
    assert cli.main(["chat", "--temperature", "0", "--max-tokens", "30", *SMALL]) == 0
    assert capsys.readouterr().out == f"{first}\n{second}\n"


def test_a_chat_template_of_the_users_is_the_one_used(llm, tmp_path, monkeypatch, capsys):
    """Oracle: generate from the text that the template is."""
    import fnengine as fn

    file = tmp_path / "t.jinja"
    file.write_text("Once upon a {{ messages[0].content }}")
    wanted = llm.generate("Once upon a time", fn.Sampling(temperature=0), fn.Stop(max_tokens=8))[0].text
    monkeypatch.setattr("sys.stdin", io.StringIO("time\n"))
    words = ["chat", "--temperature", "0", "--max-tokens", "8", "--chat-template", str(file), *SMALL]
    assert cli.main(words) == 0
    assert capsys.readouterr().out == f"{wanted}\n"
    assert cli.main([*words[: -len(SMALL) - 1], str(tmp_path / "none"), *SMALL]) == 2
    assert "--chat-template: cannot read" in capsys.readouterr().err


def test_doctor_says_what_an_engine_is(llm, capsys):
    """Oracle: an engine built with the same settings."""
    assert cli.main(["doctor", "--json", *SMALL]) == 0
    said = json.loads(capsys.readouterr().out)
    built = llm.engine.built
    assert said["memory"]["KV pool"].startswith(f"{built.pool.bytes / 2**10:.1f} KiB: {built.pool.blocks} blocks")
    assert said["model"]["name"] == "demo"
    assert said["steps"]["execution"] == built.execution == "eager: --enforce-eager"
    assert set(said["kernels"]) == {op for op, *_ in describe(built.ops)}
    assert said["steps"]["seed promise"].startswith("holds" if built.ops.invariant else "does not hold")
    assert said["versions"]["python"].startswith(".".join(map(str, sys.version_info[:3])))


def test_the_seed_promise_fails_with_a_kernel_that_is_not_invariant(llm):
    """The mutant: plain torch attention, whose sums depend on the shape of the batch."""
    import torch

    from fnengine import kernels
    from fnengine.cli.doctor import seed_promise

    holds, why = seed_promise(llm.model, kernels.ops("cpu", torch.float32, only="reference"))
    assert not holds and why.startswith("paged_attention")
    gpu = dataclasses.replace(llm.model, device=torch.device("cuda"))
    assert not seed_promise(gpu, llm.engine.built.ops)[0]


# --- files of flags ---------------------------------------------------------------------------------------------------


def test_a_file_stands_for_its_flags_and_the_command_line_goes_before(tmp_path, capsys):
    """Oracle: the same flags written out, and the table that --show-config prints."""
    path = tmp_path / "f.yaml"
    path.write_text(
        "model: demo\nmax_model_len: 4K\nenforce-eager: true\nenable_prefix_caching: false\nport: 5\n"
        "api-key: [a, b]\nspeculative-config: {method: ngram}\nuds: null\nserved-model-name: [x]\nseed: -0\n"
    )
    assert cli.main(["serve", "--port", "7", f"--config={path}", "--show-config"]) == 0
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()}
    assert rows["--port"].split() == ["7", "command", "line"]
    assert rows["--max-model-len"].split() == ["4096", str(path)]
    assert rows["--enable-prefix-caching"].split()[0] == "no" and rows["--enforce-eager"].split()[0] == "yes"
    assert rows["--api-key"].startswith("2 set") and '"ngram"' in rows["--speculative-config"]
    words, origins = files.expand(["serve", "--config", str(path), "--no-enable-prefix-caching", "--", "x"])
    assert words[-2:] == ["--", "x"] and "--enable-prefix-caching" not in origins and "--uds" in origins
    assert words.count("--no-enable-prefix-caching") == 1
    for text, says in (
        ("- a", "must be a mapping"),
        ("a: [", "is no YAML"),
        ("port: [[1]]", "port must be a text"),
        ("prot: 1", "did you mean --port"),
        ("tensor_parallel_size: 2", "--tensor-parallel-size: is not implemented"),
    ):
        path.write_text(text)
        assert cli.main(["serve", "--config", str(path)]) == 2
        assert re.search(says, capsys.readouterr().err), says
    path.write_text("")
    assert files.expand(["serve", "--config", str(path)]) == (["serve"], {})


def test_defaults_of_sampling_are_checked():
    assert overrides({"temperature": 0.5, "max_new_tokens": 7}) == {"temperature": 0.5, "max_new_tokens": 7}
    for bad in ({"top_k": "5"}, {"temperature": -1}, {"max_new_tokens": 0}, {"seed": 5}, {"top_p": True}):
        with pytest.raises(ConfigError, match="--override-generation-config"):
            overrides(bad)
