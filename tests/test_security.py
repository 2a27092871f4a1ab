"""What a server must not do for strangers. Oracles: raw answers, what stands in logs and outputs, the source's own
syntax trees."""

from __future__ import annotations

import ast
import shutil
import ssl
import subprocess
from pathlib import Path

import httpx
import pytest

from fnengine import cli
from fnengine.serve.translate import MOST_PROMPTS
from tests.test_serve import CHAT, SCRIPTS, TEXT, ScriptedEngine, problem, serving

ROOT = Path(__file__).parents[1]
SOURCES = sorted(p for folder in ("fnengine", "kernels", "graphs") for p in (ROOT / folder).rglob("*.py"))
SECRET, WRONG = "sk-very-secret-4711", "sk-not-the-one-0815"


def test_browsers_of_other_origins_get_nothing_unless_asked():
    with serving(ScriptedEngine(SCRIPTS)) as server:
        ask = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        r = httpx.options(f"{server.url}/v1/completions", headers=ask)
        assert r.status_code == 405 and not [h for h in r.headers if h.startswith("access-control")]
        r = server.post("/v1/completions", TEXT, headers={"origin": "http://evil.example"})
        assert r.status_code == 200 and not [h for h in r.headers if h.startswith("access-control")]
    with serving(ScriptedEngine(SCRIPTS), allowed_origins=["http://a.example"]) as server:
        r = server.post("/v1/completions", TEXT, headers={"origin": "http://evil.example"})
        assert "access-control-allow-origin" not in r.headers


def test_prompts_are_bounded_by_number():
    with serving(ScriptedEngine(SCRIPTS)) as server:
        many = {**TEXT, "prompt": [[97]] * (MOST_PROMPTS + 1), "max_tokens": 1}
        problem(server.post("/v1/completions", many), 400, "prompt", f"at most {MOST_PROMPTS} prompts")
        assert server.engine.requests == []
        problem(server.post("/v1/completions", {**TEXT, "n": 129}), 400, "n", "128")


def test_stop_strings_are_bounded():
    with serving(ScriptedEngine(SCRIPTS)) as server:
        for stop in ("x" * 16385, ["x" * 100] * 164, ["x"] * 257):
            problem(server.post("/v1/completions", {**TEXT, "stop": stop}), 400, "stop", "at most 256 strings of 16384")
        for stop in ("x" * 16384, ["x"] * 256):
            assert server.post("/v1/completions", {**TEXT, "stop": stop}).status_code == 200


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(tmp_path):
    key, cert = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([*make.split(), *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    trusted = ssl.create_default_context(cafile=cert)
    with serving(ScriptedEngine(SCRIPTS), ssl_keyfile=key, ssl_certfile=cert) as server:
        assert server.url.startswith("https://")
        server.http = httpx.Client(base_url=server.url, verify=trusted, timeout=20)
        assert server.post("/v1/completions", TEXT).json()["choices"][0]["text"] == "Hello, wörld!"
        assert len(server.events("/v1/completions", TEXT)) > 5
        with pytest.raises(httpx.ConnectError):
            httpx.get(server.url + "/health")  # nobody vouches for the certificate
        with pytest.raises(httpx.HTTPError):
            httpx.get(server.url.replace("https", "http") + "/health")


def test_no_key_no_prompt_and_no_answer_stand_in_any_log(capfd, caplog):
    caplog.set_level("DEBUG")
    lines, faults = [], []
    private = "my private diary"
    options = {"api_keys": [SECRET], "access": lines.append, "log": faults.append, "log_level": "debug"}
    with serving(ScriptedEngine({**SCRIPTS, private: SCRIPTS["fails"]}), key=SECRET, **options) as server:
        assert server.post("/v1/completions", {**TEXT, "prompt": private}).status_code == 500
        assert server.post("/v1/chat/completions", {**CHAT, "temperature": private}).status_code == 400
        assert server.post("/v1/completions", TEXT).status_code == 200
        for wrong in ({"authorization": f"Bearer {WRONG}"}, {"x-api-key": WRONG}):
            assert httpx.post(server.url + f"/v1/completions?key={SECRET}", json=TEXT, headers=wrong).status_code == 401
        server.http.get(f"/v1/models?key={SECRET}")
        assert SECRET not in server.http.get("/metrics").text + server.http.get("/debug/state").text
    captured = capfd.readouterr()
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("http", "asyncio"))]  # not the client's
    everything = "\n".join([*lines, *faults, captured.out, captured.err, *ours])
    assert len(lines) >= 6 and faults
    for hidden in (SECRET, WRONG, private, "wörld"):
        assert hidden not in everything, hidden


def test_the_list_of_resolved_values_hides_keys(monkeypatch, capsys):
    monkeypatch.setenv("FNENGINE_API_KEY", f"{SECRET},{WRONG}")
    assert cli.main(["serve", "--show-config"]) in (0, None)
    told = capsys.readouterr().out
    assert "--api-key" in told and "2 set" in told and SECRET not in told and WRONG not in told


OWN = ("graphs/replay.py",)
"""Runs what this installation compiled and keeps under a digest of all that it depends on."""


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=[str(p.relative_to(ROOT)) for p in SOURCES])
def test_nothing_from_outside_is_run(path):
    """No pickle, no eval; what torch reads, it reads as weights."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {n.split(".")[0] for n in names} & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
    for name, node in calls(tree):
        assert name not in ("eval", "exec", "os.system") or str(path.relative_to(ROOT)) in OWN, (path, node.lineno)
        if name == "torch.load":
            assert any(k.arg == "weights_only" and ast.literal_eval(k.value) is True for k in node.keywords)
        assert not any(k.arg == "shell" and ast.unparse(k.value) == "True" for k in node.keywords), (path, node.lineno)
