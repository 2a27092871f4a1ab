"""Kinds of products chosen by measurement. Oracles: tables of times made up here, with the choice worked out by hand;
the tokens of transformers; keys changed by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from fnengine import checkpoint, environment, leaves, memory, packed, params, products, tree
from fnengine.build import build
from fnengine.cli import main
from fnengine.graphs import compile as compiling
from fnengine.leaves import Dense, Packed, Packing, Tiled
from fnengine.model import load
from fnengine.params import Products
from fnengine.products import Measured, choose
from fnengine.runtime import Runtime
from fnengine.settings import Mode, Settings
from tests.models import tiny_folder, upstream

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(compiling.missing_compiler() is not None, reason="needs a C++ compiler")

A, B, HEAD = (4096, 1024), (1024, 2048), (50000, 1024)
SHAPES = Products(layers=((A, 20), (B, 20)), depth=10, head=HEAD, tied=False)


def flat(**ms: float) -> dict[str, dict[int, float]]:
    """Times of kinds that take as long for any number of rows."""
    return {kind: dict.fromkeys(products.SHARES, t * 1e-3) for kind, t in ms.items()}


def head(**ms: float) -> dict[str, dict[int, float]]:
    return {kind: {rows: t for rows, t in times.items() if rows < 64} for kind, times in flat(**ms).items()}


def rest(kind: str = "tiled") -> dict:
    """Shapes of which nothing but one kind is known."""
    return {A: flat(**{kind: 1}), B: flat(**{kind: 1}), HEAD: head(**{kind: 1})}


def of(a: str, b: str, end: str) -> dict:
    return {A: a, B: b, HEAD: end}


# --- the choice: times made up ----------------------------------------------------------------------------------------


def test_shares_are_parts_of_one_and_most_of_them_decode():
    assert sum(products.SHARES.values()) == pytest.approx(1)
    assert sum(share for rows, share in products.SHARES.items() if rows <= 32) == pytest.approx(0.75)


def test_a_score_by_hand():
    """Half the time at 2 rows and twice the time at 256: 0.3 x 0.5 + 0.25 + 0.2 + 0.25 x 2 = 1.10. The head, which sees
    no 256 rows: (0.15 + 0.25 + 0.2) / 0.75 = 0.8."""
    than = dict.fromkeys(products.SHARES, 4.0)
    assert products.score({2: 2.0, 8: 4.0, 32: 4.0, 256: 8.0}, than) == pytest.approx(1.10)
    del than[256]
    assert products.score({2: 2.0, 8: 4.0, 32: 4.0}, than) == pytest.approx(0.8)


@pytest.mark.parametrize(("packed", "want"), [(0.85, "packed"), (0.95, "tiled"), (1.5, "tiled")])
def test_the_head_goes_to_who_is_faster_by_the_margin(packed, want):
    times = {**rest(), HEAD: head(tiled=1, packed=packed, dense=2)}
    assert choose(SHAPES, times, "tiled") == of("tiled", "tiled", want)


def test_a_tied_head_is_not_held_twice_for_speed():
    tied = dataclasses.replace(SHAPES, tied=True)
    assert choose(tied, {**rest(), HEAD: head(tiled=1, packed=0.5)}, "tiled")[HEAD] == "tiled"
    assert choose(tied, {**rest(), HEAD: head(tiled=1, packed=0.5, dense=0.6)}, "tiled")[HEAD] == "dense"
    assert choose(tied, {**rest("packed"), HEAD: head(packed=1, tiled=0.95)}, "packed")[HEAD] == "packed"


def test_a_product_outside_of_our_kernels_must_also_gain_what_recording_gives():
    """10 layers: 2.5 ms of Python in steps of up to 32 rows. Products: 20 x 2 + 20 x 1 = 60 ms. With A packed in 1.6
    ms: 52 + 2.5 = 54.5 at 2, 8 and 32 rows and 52 at 256, which is 0.75 x 0.908 + 0.25 x 0.867 = 0.898: just below
    0.9. In 1.7 ms (itself 0.85): 0.942 x 0.75 + 0.225 = 0.931, and so not."""
    for ms, want in ((1.6, "packed"), (1.7, "tiled")):
        times = {**rest(), A: flat(tiled=2, packed=ms)}
        assert choose(SHAPES, times, "tiled") == of(want, "tiled", "tiled"), ms
    times = {**rest(), A: flat(tiled=2, packed=1.7)}
    found = products.score_of_layers(SHAPES, times, of("packed", "tiled", ""), of("tiled", "tiled", ""))
    assert found == pytest.approx(0.75 * 56.5 / 60 + 0.25 * 54 / 60)


def test_in_small_layers_python_outweighs_any_product():
    """20 + 20 products of 0.05 ms: 2 ms a step; half of that is less than the 2.5 ms of Python."""
    times = {**rest(), A: flat(tiled=0.05, packed=0.025), B: flat(tiled=0.05, packed=0.025)}
    assert choose(SHAPES, times, "tiled") == of("tiled", "tiled", "tiled")


def test_where_the_order_begins_with_packed_all_tiled_gains_recording():
    """Both unrecorded: each shape by itself. All tiled: recorded, so 40 + 2.5 ms become 40 x 0.97, which is a gain of
    8.7 %, too little; with 0.93, 12.4 %."""
    alone = {**rest("packed"), A: flat(packed=1, tiled=0.8)}
    assert choose(SHAPES, alone, "packed") == of("tiled", "packed", "packed")
    for t, want in ((0.97, "packed"), (0.90, "tiled")):
        times = {**rest("packed"), A: flat(packed=1, tiled=t), B: flat(packed=1, tiled=t)}
        assert choose(SHAPES, times, "packed") == of(want, want, "packed"), t


def test_what_was_not_measured_keeps_the_order():
    assert choose(SHAPES, {}, "tiled") == of("tiled", "tiled", "tiled")
    assert choose(SHAPES, {HEAD: head(tiled=1, dense=0.5)}, "tiled") == of("tiled", "tiled", "dense")


def test_another_kind_must_win_twice():
    """The minute in which the fixed kind was disturbed, or the other one lucky, does not count."""
    first, second = flat(tiled=1, packed=0.5), flat(tiled=0.6, packed=0.7)
    assert products.sober(first, second, "tiled") == flat(tiled=0.6, packed=0.7)
    assert products.sober(second, first, "tiled") == flat(tiled=0.6, packed=0.7)


# --- measuring --------------------------------------------------------------------------------------------------------


def test_breaking_the_law_is_seen(monkeypatch):
    """The mutant: a product whose sums depend on how many rows there are."""
    leaf, x = Dense(torch.randn(64, 64)), torch.randn(40, 64)
    assert products.breaks(leaf, x) is None
    monkeypatch.setattr(products, "matmul", lambda leaf, x: (x @ leaf.weight.T) * (1 + (len(x) == 3) * 1e-6))
    assert products.breaks(Dense(torch.ones(64, 64)), torch.ones(40, 64)) == 3


@needs_compiler
def test_what_is_slow_or_breaks_the_law_is_out(monkeypatch):
    """Oracle: a kind that sleeps, and one whose rows are not its own."""
    real, calls = products.matmul, []

    def matmul(leaf, x):
        if isinstance(leaf, Dense):
            torch.mm(torch.ones(400, 400), torch.ones(400, 400))
        calls.append(type(leaf))
        return real(leaf, x) + (len(x) == 5 and isinstance(leaf, Packed))

    monkeypatch.setattr(products, "matmul", matmul)
    monkeypatch.setattr(products, "SECONDS", 0.0)
    kinds = {k: how for k, how in leaves.layouts(CPU, torch.float32).items() if isinstance(how, Packing)}
    if len(kinds) < 3:
        pytest.skip("not every kind is here")
    times, out = products.measure_shape((64, 64), 2, [2, 8, 40], kinds, "tiled", torch.float32)
    assert set(times) == {"tiled"} and set(times["tiled"]) == {2, 8, 40}
    assert "5 rows" in out["packed"] and "as slow as tiled at 2 rows" in out["dense"]
    assert calls.count(Dense) == 4, "a round to warm up and three that count"


def test_caches_as_the_system_tells_them(tmp_path):
    for i, size in enumerate(["32K", "1024K", "3M", "broken"]):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    assert environment.cache_bytes(tmp_path) == 3 << 20
    assert environment.cache_bytes(tmp_path / "none") == 32 << 20


# --- kept and read ----------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A folder of measurements of the test's own, in which tiny weights count."""
    monkeypatch.setattr(products, "folder", lambda: tmp_path / "products")
    monkeypatch.setattr(products, "LEAST", 0)
    return tmp_path / "products"


def kept(name: str, choice: dict[str, str], usual: str = "tiled", dtype: torch.dtype = torch.float32) -> Measured:
    """A measurement of a tiny model as if one had been made: the kind of each leaf of a layer, and of the head."""
    spec = checkpoint.read_spec(tiny_folder(name))
    infos = params.abstract(spec)
    shapes = {key: infos["layers"][0][key].weight.shape for key in ("qkv", "o", "gate_up", "down")}
    shapes["head"] = (spec.vocab, spec.width)
    kinds = {shape: usual for shape in params.products(spec).count}
    kinds |= {shapes[key]: kind for key, kind in choice.items()}
    key = products.key(spec, dtype)
    return products.write(key, Measured(kinds, {}, {}, products.path_of(key)))


def needs_kinds(*kinds: str) -> None:
    found = leaves.layouts(CPU, torch.float32)
    for kind in kinds:
        if isinstance(why := found[kind], str):
            pytest.skip(why)


def test_what_is_kept_is_read_again_and_a_damaged_file_is_not(cache):
    spec = checkpoint.read_spec(tiny_folder("qwen3"))
    made = kept("qwen3", {"down": "packed"})
    key = products.key(spec, torch.float32)
    full = dataclasses.replace(
        made, times={(64, 96): flat(tiled=1.5, packed=1)}, out={(64, 96): {"dense": "5 times as slow"}}
    )
    assert products.read(spec, torch.float32) == made
    products.write(key, full)
    assert products.read(spec, torch.float32) == full
    whole = json.loads(made.path.read_text())
    for damage in ("{", "[]", json.dumps({**whole, "kinds": {"64 x 96": "packed"}}), json.dumps({"key": key})):
        made.path.write_text(damage)
        assert products.read(spec, torch.float32) is None
    broken = {**whole, "kinds": dict.fromkeys(whole["kinds"], "unheard of")}
    made.path.write_text(json.dumps(broken))
    assert products.read(spec, torch.float32) is None


@pytest.mark.parametrize("field", ["processor", "instructions", "threads", "dtype", "torch", "source", "shapes"])
def test_another_machine_version_or_model_misses(cache, field, monkeypatch):
    """Law: whatever the choice depends on is in its key; and where the key lies is not (a folder may be copied)."""
    spec = checkpoint.read_spec(tiny_folder("qwen3"))
    made, dtype = kept("qwen3", {"down": "packed"}), torch.float32
    there = environment.processor()
    moved = made.path.parent.with_name("elsewhere")
    made.path.parent.rename(moved)
    monkeypatch.setattr(products, "folder", lambda: moved)
    assert products.read(spec, dtype) is not None
    if field in ("processor", "instructions"):
        monkeypatch.setattr(products, "processor", lambda: {**there, field: ["other"]})
    elif field == "threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    elif field == "dtype":
        dtype = torch.bfloat16
    elif field == "torch":
        monkeypatch.setattr(torch, "__version__", "2.0.0")
    elif field == "source":
        monkeypatch.setattr(products.keys, "of_files", lambda files: {"linear.cpp": "0123"})
    else:
        spec = checkpoint.read_spec(tiny_folder("mistral"))
    assert products.read(spec, dtype) is None
    near = products.nearest(spec, dtype)
    if field == "shapes":
        assert near is None, "of another model"
    else:
        assert near is not None and {d.field.split(".")[0] for d in near.differences} == {field}


def test_small_weights_are_not_measured_and_nothing_is_read(cache, monkeypatch):
    kept("qwen3", {"down": "packed"})
    monkeypatch.setattr(products, "LEAST", 1 << 20)
    spec = checkpoint.read_spec(tiny_folder("qwen3"))
    assert products.packing(spec, CPU, torch.float32) == leaves.packing(CPU, torch.float32)
    assert "smaller than 1 MiB" in str(products.measure(spec, torch.float32))


def test_a_kind_that_is_gone_is_not_used(cache, monkeypatch):
    """As where the library was built when it was measured, and cannot be any more."""
    needs_kinds("tiled", "packed")
    kept("qwen3", {"down": "packed"})
    spec = checkpoint.read_spec(tiny_folder("qwen3"))
    assert products.packing(spec, CPU, torch.float32).kinds == ("tiled", "packed")
    how = products.packing(spec, CPU, torch.float32, tiles=lambda *_: "no C++ compiler found")
    assert how.kinds == ("packed",) and "tiled was measured, but no C++ compiler found" in how.reason


def test_a_quantized_model_has_no_choice(cache):
    kept("qwen3", {"down": "packed"})
    spec = checkpoint.read_spec(tiny_folder("qwen3"))
    assert products.packing(spec, CPU, torch.float32, "int8") == leaves.packing(CPU, torch.float32, "int8")


MIXED = {"down": "packed", "o": "dense"}


@needs_compiler
@pytest.mark.parametrize("head", leaves.LAYOUTS)
def test_a_mixed_choice_gives_the_models_tokens_compiled(cache, head):
    """Oracle: transformers, greedy tokens and logits; leaves and bytes as the choice says; keys of their own."""
    needs_kinds("tiled", "packed")
    name = "qwen3"
    before = load(tiny_folder(name), dtype="float32", device="cpu")
    kept(name, {**MIXED, "head": head})
    model = load(tiny_folder(name), dtype="float32", device="cpu")
    first, end = model.params["layers"][0], model.params["head"] or model.params["embed"]
    kinds = [type(first[key]) for key in ("qkv", "o", "gate_up", "down")]
    assert kinds == [Tiled, Dense, Tiled, Packed]
    assert type(end) is {"tiled": Tiled, "packed": Packed, "dense": Dense}[head]
    held = sum(
        x.nbytes if isinstance(x, torch.Tensor) else leaves.weight_bytes(x)
        for _, x in tree.items(model.params, stop=leaves.KINDS)
    )
    assert params.memory_plan(model.spec, model.dtype, model.how).weights == held
    built = build(model, Settings(max_model_len=64, max_num_seqs=4))
    assert built.execution.startswith("compiled") and "recorded" not in built.execution
    assert built.account is not None and "packed for 64 x 96" in built.account.line("weights").why
    assert built.account.line("weights").bytes == held and built.account.line("recorded steps").bytes == 0
    rt, plain = (Runtime(m, max_model_len=64, max_num_seqs=4) for m in (model, before))
    seq, other, ids = rt.empty, plain.empty, [5, 9, 3]
    seq, logits = rt.extend(seq, ids)
    other, unmixed = plain.extend(other, ids)
    for _ in range(12):
        torch.testing.assert_close(logits, unmixed, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            wanted = upstream(name)(torch.tensor([ids])).logits[0, -1]
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)
        token = int(logits.argmax())
        assert token == int(wanted.argmax())
        ids = [*ids, token]
        seq, logits = rt.extend(seq, [token])
        other, unmixed = plain.extend(other, [token])


def test_the_ledger_and_kept_weights_see_the_choice():
    """By hand: a packed head of 131 x 64 float32 beside the embedding, 33,536 bytes; other weights, another key."""
    spec = checkpoint.read_spec(tiny_folder("qwen3"))
    tiles = Packing("tiled", "", 1)
    mixed = dataclasses.replace(tiles, table=(((131, 64), "packed"),))
    plan = params.memory_plan(spec, torch.float32, mixed)
    padding = (160 - 131) * 64 * 4  # tiles have 32 rows
    assert plan.packed_head == 131 * 64 * 4
    assert plan.weights == params.memory_plan(spec, torch.float32, tiles).weights - padding + 131 * 64 * 4
    shapes = memory.Shapes(spec, torch.float32, mixed, Mode(budget=32, rows=8), max_len=64, blocks=5)
    assert shapes.kinds == {"tiled"} and shapes.head == "packed"
    assert memory.account(shapes).line("weights").why == "tiled; packed for 131 x 64, the embedding is the head"
    dense = dataclasses.replace(tiles, table=(((64, 96), "dense"),))
    digests = {packed.path_of(packed.key([], spec, torch.float32, how)) for how in (tiles, mixed, dense)}
    assert len(digests) == 3
    folder = tiny_folder("qwen3")
    assert checkpoint.packed_key(folder, spec, torch.float32, CPU, mixed) is None, "an opaque weight cannot be kept"
    assert checkpoint.packed_key(folder, spec, torch.float32, CPU, dense) is not None


@needs_compiler
def test_compile_measures_once_and_doctor_says_so(cache, tmp_path, monkeypatch, capsys):
    """`fnengine doctor`, `compile`, `compile` again, `doctor`; then on another number of threads."""
    needs_kinds("tiled", "packed")
    monkeypatch.setattr(products, "SECONDS", 0.0)
    monkeypatch.setattr(products, "UNRECORDED_SECONDS", 1.0)  # a choice by noise would compile another layer
    folder, flags = str(tiny_folder("qwen3")), ["--dtype", "float32", "--enforce-eager", "--debug"]

    def doctor() -> str:
        small = ["--load-format", "dummy", "--max-model-len", "32", "--max-num-seqs", "2"]  # needs no tokenizer
        assert main(["doctor", folder, "--json", *small, *flags]) == 0
        return json.loads(capsys.readouterr().out)["steps"]["products"]

    assert "fixed order; `fnengine compile MODEL` measures" in doctor()
    assert not cache.exists(), "a start never measures"
    assert main(["compile", folder, "--json", *flags]) == 0
    said = json.loads(capsys.readouterr().out)["products"]
    assert said["new"] and Path(said["file"]).parent == cache
    assert [s["shape"] for s in said["shapes"]] == [[256, 64], [64, 128], [192, 64], [64, 96], [131, 64]]
    assert all(s["seconds"][s["kind"]]["2"] > 0 for s in said["shapes"])
    assert "256" in said["shapes"][0]["seconds"]["tiled"] and "256" not in said["shapes"][-1]["seconds"]["tiled"]
    before = Path(said["file"]).read_bytes()
    assert main(["compile", folder, *flags]) == 0
    out = capsys.readouterr().out
    assert "measured before" in out and "  256 x 64" in out and out.count("chosen") == 5
    assert Path(said["file"]).read_bytes() == before
    assert "measured on this machine" in doctor()
    content = json.loads(before)
    content["key"]["threads"] = "64"
    Path(said["file"]).unlink()
    (cache / "other.json").write_text(json.dumps(content))
    now = doctor()
    assert "fixed order" in now and f"threads 64 -> {torch.get_num_threads()}" in now
