"""A kept artifact gives the same bits as the compiled one, without its compiler. Oracle: Inductor's own artifact."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from fnengine.graphs import replay
from fnengine.graphs.compile import Traces, compile_flat, kept, missing_compiler

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(missing_compiler() is not None, reason="needs a C++ compiler")


def fn(x, weight, pool):
    """A norm, a product and a write into what it was given: the three things a layer does."""
    y = torch.nn.functional.linear(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5), weight)
    pool.add_(y.sum(0))
    return torch.nn.functional.silu(y) + x


def inputs(n: int):
    draw = torch.Generator().manual_seed(n)
    return [torch.randn(*shape, generator=draw) for shape in ((n, 24), (24, 24), (24,))]


def make(folder: Path | None):
    traces = Traces()
    artifact = compile_flat(
        fn, inputs(5), [(0,), (), ()], name="small", key={"test": "replay"}, folder=folder, traces=traces
    )
    return artifact, traces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of artifacts, and what the compiled function gave for several sizes."""
    folder = tmp_path_factory.mktemp("artifacts")
    assert not kept(folder)
    compiled, traces = make(folder)
    assert (traces.compiled, traces.loaded, compiled.source) == (1, 0, "compiled")
    assert kept(folder)
    return folder, {n: run(compiled, n) for n in (2, 5, 33)}


def run(artifact, n: int):
    args = inputs(n)
    return artifact(*args), args[2]


def test_a_kept_artifact_gives_the_same_bits_and_writes_the_same_places(folder):
    folder, wanted = folder
    artifact, traces = make(folder)
    assert (traces.compiled, traces.loaded, artifact.source) == (0, 1, "loaded")
    for n, (out, pool) in wanted.items():
        again, written = run(artifact, n)
        assert torch.equal(again, out) and torch.equal(written, pool)
        assert not torch.equal(written, inputs(n)[2])
        close, _ = fn(*inputs(n)), None
        torch.testing.assert_close(again, close, rtol=1e-4, atol=1e-4)


def test_it_is_loaded_without_the_compiler(folder):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "from pathlib import Path\n"
        "import test_replay, torch\n"
        "torch.set_num_threads(1)\n"
        f"artifact, traces = test_replay.make(Path({str(folder[0])!r}))\n"
        "assert (traces.compiled, traces.loaded) == (0, 1)\n"
        "out, _ = test_replay.run(artifact, 5)\n"
        "assert out.shape == (5, 24)\n"
        "assert not {'torch._inductor', 'torch._dynamo', 'sympy'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("damage", ["truncated", "no kernels", "another runner"])
def test_a_damaged_one_is_not_used(folder, damage, tmp_path, caplog):
    """The artifact itself still loads, the long way, and the file is made again."""
    for file in folder[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (file,) = tmp_path.glob("*.zip")
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        with zipfile.ZipFile(file) as archive:
            files = {n: archive.read(n) for n in archive.namelist()}
        if damage == "no kernels":
            files = {n: b"" if n.endswith(".so") else data for n, data in files.items()}
        else:
            files[replay.SOURCE] = b"class Walker: pass"
        with zipfile.ZipFile(file, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    with caplog.at_level("WARNING", "fnengine"):
        artifact, traces = make(tmp_path)
    assert "taking the long way" in caplog.text
    assert (traces.compiled, traces.loaded) == (0, 1)
    out, pool = run(artifact, 33)
    assert torch.equal(out, folder[1][33][0]) and torch.equal(pool, folder[1][33][1])
    replay.load(file)


def test_code_that_uses_what_is_not_kept_is_not_kept(tmp_path):
    import types

    module = types.ModuleType("generated")
    module.__file__ = str(tmp_path / "generated.py")
    Path(module.__file__).write_text("class Runner:\n    def call(self, args):\n        return (mystery(args),)\n")
    with pytest.raises(replay.NotReplayable, match="mystery"):
        replay.keep(module, tmp_path / "x.zip")
    assert not (tmp_path / "x.zip").exists()
