"""Artifacts: their keys are known before anything is built, a miss is explained, and a kept folder may be moved.

Oracles: what an engine with real weights builds; differences put in by hand; a process that must not compile.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fnengine import artifacts, checkpoint, environment, kernels, keys, leaves, tree
from fnengine.cli import cold, main
from fnengine.errors import ConfigError
from fnengine.graphs import compile as compiling
from fnengine.kernels import native
from fnengine.program import wanted_layers
from tests.models import TINY, tiny_folder, tiny_model, upstream

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(compiling.missing_compiler() is not None, reason="needs a C++ compiler")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# --- keys -------------------------------------------------------------------------------------------------------------

OLD = {"torch": "2.12.0", "threads": "4", "cpu": ["avx2", "fma"], "source": {"a.py": "1", "b.py": "2"}, "gone": "x"}
NEW = {"torch": "2.13.0", "threads": "4", "cpu": ["fma", "avx512f"], "source": {"a.py": "1", "b.py": "3"}}


def test_differences_by_hand():
    said = [(d.field, d.old, d.new) for d in keys.differences(OLD, NEW)]
    assert said == [
        ("cpu.avx2", "yes", "none"),
        ("cpu.avx512f", "none", "yes"),
        ("gone", "x", "none"),
        ("source.b.py", "2", "3"),
        ("torch", "2.12.0", "2.13.0"),
    ]
    assert keys.differences(OLD, json.loads(keys.text(OLD))) == (), "a key survives being kept"


def test_a_digest_differs_with_every_field_and_not_with_their_order():
    assert keys.digest(OLD) == keys.digest(dict(reversed(OLD.items())))
    changed = [{**OLD, field: "other"} for field in OLD]
    assert len({keys.digest(key) for key in (OLD, NEW, *changed)}) == 2 + len(OLD)


def test_the_nearest_differs_in_the_fewest_fields_of_the_top(tmp_path):
    """By hand: one field with two parts in it is nearer than two fields; the unrelated one is not looked at."""
    kept = {
        "two fields": {**OLD, "torch": "2.11.0", "threads": "2"},
        "one field, two parts": {**OLD, "source": {"a.py": "7", "b.py": "8"}},
        "unrelated": {**OLD, "gone": "another model"},
    }
    for name, key in kept.items():
        (tmp_path / f"{name}.json").write_text(keys.text(key))
    (tmp_path / "damaged.json").write_text("{")
    (tmp_path / "no key.json").write_text("[]")
    assert keys.kept(tmp_path) == kept
    found = keys.nearest(OLD, keys.kept(tmp_path), lambda key: key["gone"] == "x")
    assert found is not None and found.name == "one field, two parts"
    assert [d.field for d in found.differences] == ["source.a.py", "source.b.py"]
    assert keys.nearest(OLD, kept, lambda key: False) is None


@dataclasses.dataclass(frozen=True)
class A:
    n: int
    inner: B | None = None


@dataclasses.dataclass(frozen=True)
class B:
    n: int


def test_a_described_dataclass_tells_its_classes_apart():
    assert keys.described(A(1, B(2))) == {"is": "A", "n": "1", "inner": {"is": "B", "n": "2"}}
    assert keys.described(B(1)) != keys.described(A(1))


# --- known before anything is built -----------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_preprocessor_knows_what_the_library_will_say(dtype):
    """Oracle: the library itself, and the layout that `packing` picks with it."""
    kind = DTYPES[dtype]
    compiler, isa = native.find_compiler(), native.host_isa()
    assert native.expected_atom(compiler, isa, dtype) == kernels.linear.atom_of(kind)
    expected, real = leaves.packing(CPU, kind, tiles=leaves.expected_tiles), leaves.packing(CPU, kind)
    assert (expected.kind, expected.atom) == (real.kind, real.atom)
    both = kernels.expected(CPU, kind), kernels.ops(CPU, kind)
    names = [[line[:3] for line in kernels.describe(o)] for o in both]
    assert names[0] == names[1] and both[0].kv == both[1].kv


@needs_compiler
@pytest.mark.parametrize("kind", ["tiled", "packed", "dense"])
@pytest.mark.parametrize("name", TINY)
def test_an_outline_has_the_shapes_of_loaded_weights(name, kind):
    """Oracle: dummy weights, placed for real; keys made from either are one."""
    how = leaves.layouts(CPU, torch.float32)[kind]
    if isinstance(how, str):
        pytest.skip(how)
    spec = checkpoint.read_spec(tiny_folder(name))
    real = checkpoint.dummy(spec, torch.float32, CPU, how)
    outline = checkpoint.outline(spec, torch.float32, how)

    def shapes(params):
        return [(path, tuple(x.shape), x.dtype, x.stride()) for path, x in tree.items(params)]

    assert shapes(outline) == shapes(real)
    assert all(x.is_meta for x in tree.leaves(outline))
    ops = kernels.expected(CPU, torch.float32)
    made = [wanted_layers(spec, p, ops, torch.float32, CPU) for p in (outline, real)]
    assert [(k.wanted.key, k.layers) for k in made[0]] == [(k.wanted.key, k.layers) for k in made[1]]
    alike: dict[object, list[int]] = {}
    for i, layer in enumerate(spec.layers):
        alike.setdefault(layer, []).append(i)
    assert [k.layers for k in made[0]] == [tuple(at) for at in alike.values()]


@needs_compiler
def test_a_key_holds_what_the_code_depends_on():
    """Each change of a model, a dtype or a machine's setting is another key, in the field of that name."""
    folder = tiny_folder("qwen3")
    key = artifacts.needs(folder, dtype="float32").layers[0].wanted.key
    assert {"torch", "python", "processor", "instructions", "threads", "kind", "ops", "source", "shapes"} <= set(key)
    assert key["torch"] == torch.__version__ and key["threads"] == str(torch.get_num_threads())
    other = artifacts.needs(tiny_folder("mistral"), dtype="float32").layers[0].wanted.key
    assert {d.field for d in keys.differences(key, other)} >= {"kind.mixer.window", "kind.mixer.width", "shapes.q_norm"}
    torch.set_num_threads(torch.get_num_threads() + 1)
    try:
        changed = artifacts.needs(folder, dtype="float32").layers[0].wanted.key
    finally:
        torch.set_num_threads(torch.get_num_threads() - 1)
    assert [d.field for d in keys.differences(key, changed)] == ["threads"]


def test_nothing_compiled_is_needed_to_run_eagerly(monkeypatch):
    folder = tiny_folder("qwen3")
    assert artifacts.needs(folder, enforce_eager=True).layers == ()
    monkeypatch.setattr(compiling, "missing_compiler", lambda: "no C++ compiler found: apt install g++")
    assert "apt install g++" in (artifacts.needs(folder).unable or "")


# --- a cache of one model ---------------------------------------------------------------------------------------------

START = """
import json, sys
import fnengine as fn
from fnengine.build import build
from fnengine.graphs import compile
def forbidden(*args): raise AssertionError("traced")
compile.trace = forbidden
model = fn.load(sys.argv[1], dtype="float32")
built = build(model, fn.Settings(max_model_len=64, max_num_seqs=4))
rt = fn.Runtime(model, max_model_len=64, max_num_seqs=4)
_, logits = rt.extend(rt.empty, [5, 9, 3])
heavy = [m for m in ("torch._inductor", "torch._dynamo", "sympy", "transformers", "fastapi") if m in sys.modules]
print(json.dumps({"compiled": built.traces.compiled, "loaded": built.traces.loaded, "heavy": heavy,
    "execution": built.execution, "native": [o.reason for o in (built.ops.paged_attention, built.ops.copy_blocks)],
    "logits": logits.tolist()}))
"""


def process(cache: Path, *words: str, **more: str) -> str:
    """What a process with this cache prints; nothing may go wrong in it."""
    env = {**environment.with_cache(cache), "FNENGINE_THREADS": "1", "OMP_NUM_THREADS": "1", **more}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def contents(cache: Path) -> set[tuple[str, int]]:
    """Every file of the artifacts and the libraries, with its time of change."""
    return {(str(f), f.stat().st_mtime_ns) for part in ("artifacts", "native") for f in (cache / part).rglob("*")}


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Path, dict]:
    """A cache that `fnengine compile` filled in its own process, from a config without weights, and what it said."""
    if (why := compiling.missing_compiler()) is not None:
        pytest.skip(why)
    cache, bare = tmp_path_factory.mktemp("cache"), tmp_path_factory.mktemp("bare")
    shutil.copy(tiny_folder("qwen3") / "config.json", bare)
    said = process(cache, "-m", "fnengine", "compile", str(bare), "--dtype", "float32", "--json")
    return cache, json.loads(said)


def doctor(cache: Path, monkeypatch, capsys, *words: str) -> list[dict]:
    """What `doctor --why-cold --json` says of the tiny model, asserting that it leaves the cache as it is."""
    monkeypatch.setenv("FNENGINE_CACHE", str(cache))
    before = contents(cache)
    flags = ["--dtype", "float32", *words]
    assert main(["doctor", "--why-cold", str(tiny_folder("qwen3")), "--json", "--debug", *flags]) == 0
    assert contents(cache) == before
    return json.loads(capsys.readouterr().out)["artifacts"]


def test_compile_says_what_it_made_and_makes_it_once(filled, monkeypatch, capsys):
    """Oracle: the files in the cache."""
    cache, said = filled
    assert [a["name"] for a in said["artifacts"]] == ["native float32", "native common", "layer0"]
    assert all(a["compiled"] and a["seconds"] > 0 for a in said["artifacts"])
    for a in said["artifacts"]:
        folder, name = ("native", a["name"][7:]) if a["name"].startswith("native") else ("artifacts", a["name"])
        stem = cache / folder / f"{name}-{a['digest']}"
        assert json.loads(stem.with_suffix(".json").read_text()) == a["key"]
        kept = [stem.with_suffix(".so")] if folder == "native" else list(stem.parent.glob(f"{stem.name}.*"))
        assert a["bytes"] == sum(f.stat().st_size for f in kept)
    monkeypatch.setenv("FNENGINE_CACHE", str(cache))
    before = contents(cache)
    assert main(["compile", str(tiny_folder("qwen3")), "--dtype", "float32", "--debug"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all("already there" in line for line in lines[1:])
    assert contents(cache) == before


@pytest.mark.parametrize("compiler", ["here", "nowhere"])
def test_a_copied_folder_is_warm(filled, compiler, tmp_path):
    """Oracles: a process that may not trace, and counts; the logits of transformers from the same weights.

    The original is gone, so that nothing can be read from where it was made.
    """
    cache, away = filled[0], tmp_path / "away"
    copy = tmp_path / "elsewhere" / "cache"
    copy.parent.mkdir()
    for part in ("artifacts", "native"):  # not Inductor's own cache
        shutil.copytree(cache / part, copy / part)
    before = contents(copy)
    cache.rename(away)
    try:
        more = {} if compiler == "here" else {"PATH": str(tmp_path)}
        got = json.loads(process(copy, "-c", START, str(tiny_folder("qwen3")), **more))
    finally:
        away.rename(cache)
    assert (got["compiled"], got["loaded"]) == (0, 1), got["execution"]
    assert got["heavy"] == []
    assert all(reason.startswith("native code") for reason in got["native"])
    assert contents(copy) == before, "something was built"
    with torch.no_grad():
        wanted = upstream("qwen3")(torch.tensor([[5, 9, 3]])).logits[0, -1]
    torch.testing.assert_close(torch.tensor(got["logits"]), wanted, rtol=1e-3, atol=1e-3)


def test_what_compile_fills_is_what_an_engine_needs(filled):
    """Oracle: the keys that real weights and the chosen kernels give."""
    model = tiny_model("qwen3", "float32")
    (kind,) = wanted_layers(model.spec, model.params, kernels.ops(CPU, torch.float32), torch.float32, CPU)
    assert keys.digest(kind.wanted.key) == filled[1]["artifacts"][-1]["digest"]


def test_doctor_finds_a_warm_cache_warm_and_an_empty_one_empty(filled, tmp_path, monkeypatch, capsys):
    found = doctor(filled[0], monkeypatch, capsys)
    assert [a["warm"] for a in found] == ["as it is", "as it is", "without a compiler"]
    assert [a["digest"] for a in found] == [a["digest"] for a in filled[1]["artifacts"]]
    found = doctor(tmp_path, monkeypatch, capsys)
    assert [(a["warm"], a["nearest"]) for a in found] == [(None, None)] * 3
    assert main(["doctor", "--why-cold", str(tiny_folder("qwen3")), "--dtype", "float32"]) == 0
    out = capsys.readouterr().out
    assert out.count("cold: nothing kept for this model") == 1 and "fnengine compile" in out


@pytest.mark.parametrize(
    ("which", "field", "old"),
    [
        ("artifacts/layer0", "torch", "2.0.0"),
        ("artifacts/layer0", "threads", "64"),
        ("artifacts/layer0", "source.layers.py", "0123"),
        ("artifacts/layer0", "kind.mixer.rope.theta", "7.0"),
        ("native/float32", "compiler", "g++ 4.0"),
        ("native/float32", "source.linear.cpp", "0123"),
        ("native/common", "flags", "-O0"),
    ],
)
def test_the_field_that_missed_is_named_and_no_other(filled, which, field, old, tmp_path, monkeypatch, capsys):
    """Oracle: the one field that was changed, in what is kept, as if it had been made by another machine."""
    for part in ("artifacts", "native"):
        shutil.copytree(filled[0] / part, tmp_path / part)
    (file,) = (tmp_path / which).parent.glob(f"{Path(which).name}-*.json")
    key = json.loads(file.read_text())
    *path, last = field.split(".", 1) if field.startswith("source") else field.split(".")
    at = key
    for name in path:
        at = at[name]
    now, at[last] = at[last], old
    stem = f"{Path(which).name}-{keys.digest(key)}"
    for kept in file.parent.glob(f"{file.stem}.*"):
        kept.rename(kept.with_name(stem + kept.suffix))
    (file.parent / f"{stem}.json").write_text(keys.text(key))
    missed = [a for a in doctor(tmp_path, monkeypatch, capsys) if a["warm"] is None]
    assert [a["name"].removeprefix("native ") for a in missed] == [Path(which).name]
    assert missed[0]["nearest"] == {"name": stem, "differences": [{"field": field, "old": old, "new": now}]}
    status = artifacts.Status(**{**missed[0], "nearest": keys.Nearest(stem, (keys.Difference(field, old, now),))})
    assert cold.lines(status)[1] == f"    {field}: {old} -> {now}"


def test_a_key_without_its_artifact_and_one_that_inductor_must_load(filled, tmp_path, monkeypatch, capsys):
    for part in ("artifacts", "native"):
        shutil.copytree(filled[0] / part, tmp_path / part)
    (file,) = (tmp_path / "artifacts").glob("*.zip")
    file.unlink()
    layer = doctor(tmp_path, monkeypatch, capsys)[-1]
    assert layer["warm"] == "through Inductor"
    file.with_suffix(".bin").unlink()
    assert main(["doctor", "--why-cold", str(tiny_folder("qwen3")), "--dtype", "float32"]) == 0
    assert f"cold: the key is kept ({file.stem}.json), what it names is gone" in capsys.readouterr().out


def test_another_dtype_is_explained_by_its_name_and_long_lists_are_cut(filled, monkeypatch, capsys):
    monkeypatch.setenv("FNENGINE_CACHE", str(filled[0]))
    assert main(["doctor", "--why-cold", str(tiny_folder("qwen3")), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "    dtype: float32 -> bfloat16" in out and "more (--json shows all)" in out
    assert "native bfloat16" in out and "native common" in out
    assert "fnengine compile " + str(tiny_folder("qwen3")) + " --dtype bfloat16" in out


def test_a_damaged_artifact_where_nothing_can_be_compiled_makes_steps_eager(filled, tmp_path, monkeypatch, caplog):
    """Oracle: the reason, with its remedy; and the warning that names the file."""
    from fnengine import build

    for file in (filled[0] / "artifacts").glob("layer*"):
        (tmp_path / file.name).write_bytes(b"garbage" if file.suffix == ".zip" else file.read_bytes())
    monkeypatch.setattr(build, "folder", lambda: tmp_path)
    for module in (build, compiling):
        monkeypatch.setattr(module, "missing_compiler", lambda: "no C++ compiler found: apt install g++")
    built = build.build(tiny_model("qwen3", "float32"), build.Settings(max_model_len=32, max_num_seqs=2))
    assert built.execution == "eager: no C++ compiler found: apt install g++"
    assert "layer0" in caplog.text and (built.traces.compiled, built.traces.loaded) == (0, 0)


def test_without_a_compiler_doctor_tells_what_a_kept_cache_is_good_for(filled, tmp_path):
    """Oracle: the start above, which needs no compiler; and an empty cache, with which it would be eager."""
    words = ("-m", "fnengine", "doctor", "--why-cold", str(tiny_folder("qwen3")), "--dtype", "float32", "--json")
    said = json.loads(process(filled[0], *words, PATH=str(tmp_path)))
    assert "apt install g++" in said["unable"] and said["eager"] is None
    assert [a["warm"] for a in said["artifacts"]] == ["as it is", "as it is", "without a compiler"]
    said = process(filled[0], "-m", "fnengine", "compile", *words[4:], PATH=str(tmp_path))
    assert not any(a["compiled"] for a in json.loads(said)["artifacts"])
    said = json.loads(process(tmp_path, *words, PATH=str(tmp_path)))
    assert "no C++ compiler" in said["eager"]
    assert [(a["name"], a["warm"]) for a in said["artifacts"]] == [("native float32", None), ("native common", None)]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_without_a_compiler_compile_is_a_mistake_with_a_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / "native").symlink_to(environment.cache_dir() / "native")  # libraries are there, artifacts are not
    monkeypatch.setenv("FNENGINE_CACHE", str(tmp_path))
    monkeypatch.setattr(compiling, "missing_compiler", lambda: "no C++ compiler found: apt install g++")
    assert main(["compile", str(tiny_folder("qwen3"))]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "apt install g++" in err


@needs_compiler
def test_a_cache_that_cannot_be_written_is_a_mistake_with_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("FNENGINE_CACHE", str(tmp_path / "file" / "cache"))
    needs = artifacts.needs(tiny_folder("qwen3"), dtype="float32", enforce_eager=True)
    with pytest.raises(ConfigError, match=r"native library float32.*FNENGINE_CACHE"):
        list(artifacts.fill(needs))
