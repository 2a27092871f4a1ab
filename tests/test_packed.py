"""Weights kept in their final form. Oracles: the params tree that the checkpoint itself gives, safetensors' own
reader."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fnengine import checkpoint, leaves, model, packed, products, tree
from fnengine.cli import main
from fnengine.runtime import Runtime
from tests.models import tiny_folder

CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A folder of kept weights of the test's own."""
    monkeypatch.setattr(packed, "folder", lambda: tmp_path / "weights")
    return tmp_path / "weights"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_folder("qwen3"), tmp_path / "model"))


def keep(folder: Path, quantization: str = "none") -> tuple[Path, bool] | str:
    return checkpoint.keep(folder, checkpoint.read_spec(folder), torch.bfloat16, CPU, quantization)


def needs_tiles() -> None:
    if leaves.packing(CPU, torch.bfloat16).kind != "tiled":
        pytest.skip(leaves.packing(CPU, torch.bfloat16).reason)


@pytest.mark.parametrize("name", ["qwen3", "llama2", "qwen2"])
@pytest.mark.parametrize("kind", ["none", *leaves.QUANTIZED])
def test_kept_weights_are_the_loaded_ones(cache, name, kind):
    """Every leaf: values, dtype, shape, structure; tied and not, with biases and not."""
    needs_tiles()
    folder = tiny_folder(name)
    spec = checkpoint.read_spec(folder)
    how = leaves.packing(CPU, torch.bfloat16, kind)
    want = checkpoint.load(folder, spec, torch.bfloat16, CPU, how)
    made = keep(folder, kind)
    assert not isinstance(made, str) and made[1] and keep(folder, kind) == (made[0], False)
    loaded = model.load(folder, dtype="bfloat16", device="cpu", quantization=kind)
    assert any(str(made[0]) in note for note in loaded.notes)
    got = dict(tree.items(loaded.params))
    expected = dict(tree.items(want))
    assert got.keys() == expected.keys()
    for path, tensor in expected.items():
        assert got[path].dtype == tensor.dtype and torch.equal(got[path], tensor), path
    kinds = [[type(leaf) for _, leaf in tree.items(p, stop=leaves.KINDS)] for p in (loaded.params, want)]
    assert kinds[0] == kinds[1]
    from_disk = load_file(made[0])
    assert all(torch.equal(from_disk[path], tensor) for path, tensor in expected.items())
    big = [t for t in got.values() if t.nbytes % packed.ALIGN == 0]
    assert big and all(t.data_ptr() % packed.ALIGN == 0 for t in big)


def test_kept_weights_are_the_process_own(cache, folder):
    """What is written to a tensor stays in this process; logits are those of the checkpoint, bit for bit."""
    needs_tiles()
    made = keep(folder)
    assert not isinstance(made, str)
    before = made[0].read_bytes()
    loaded = model.load(folder, dtype="bfloat16", device="cpu")
    assert any(str(made[0]) in note for note in loaded.notes)
    loaded.params["norm"].fill_(7)
    assert made[0].read_bytes() == before
    rt = Runtime(model.load(folder, dtype="bfloat16", device="cpu"))
    _, got = rt.extend(rt.empty, [1, 2, 3])
    made[0].unlink()
    fresh = Runtime(model.load(folder, dtype="bfloat16", device="cpu"))
    assert torch.equal(got, fresh.extend(fresh.empty, [1, 2, 3])[1])


@pytest.mark.parametrize("what", ["weights", "dtype", "quantization"])
def test_what_changed_is_not_read(cache, folder, what):
    """Law: other weights, another dtype or layout has another key, and so the checkpoint is read."""
    needs_tiles()
    assert not isinstance(keep(folder), str)
    dtype, kind = "bfloat16", "none"
    if what == "weights":  # the same header and size; only the time tells
        file = folder / "model.safetensors"
        os.utime(file, ns=(1, file.stat().st_mtime_ns + 1))
    elif what == "dtype":
        dtype = "float32"
    else:
        kind = "int8"
    loaded = model.load(folder, dtype=dtype, device="cpu", quantization=kind)
    assert not any("kept" in note for note in loaded.notes)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "other tensors", "empty"])
def test_a_damaged_file_is_not_used(cache, folder, damage):
    needs_tiles()
    made = keep(folder)
    assert not isinstance(made, str)
    data = made[0].read_bytes()
    changed = {
        "truncated": data[:-1000],
        "garbage": b"\xff" * 100,
        "other tensors": data.replace(b'"norm"', b'"nurm"', 1),
        "empty": b"",
    }[damage]
    made[0].write_bytes(changed)
    assert not any("kept" in n for n in model.load(folder, dtype="bfloat16", device="cpu").notes)
    again = keep(folder)
    assert again == (made[0], True) and made[0].read_bytes() == data


def test_layouts_of_the_checkpoint_are_not_kept(cache, monkeypatch):
    monkeypatch.setattr(products, "packing", lambda *a, **k: leaves.Packing("dense", "so"))
    why = keep(tiny_folder("qwen3"))
    assert isinstance(why, str) and "dense" in why and not cache.exists()


def test_the_command_keeps_them(cache, folder, capsys):
    """`fnengine compile --weights`, twice; then one that cannot be written, which says what to do."""
    needs_tiles()
    command = ["compile", str(folder), "--weights", "--json", "--enforce-eager", "-q", "int8-dynamic"]
    assert main(command) == 0
    first = json.loads(capsys.readouterr().out)["weights"]
    assert Path(first["file"]).stat().st_size == first["bytes"] and first["note"] is None
    assert main(command) == 0
    assert "already there" in json.loads(capsys.readouterr().out)["weights"]["note"]
    Path(first["file"]).unlink()
    shutil.rmtree(cache)
    cache.write_text("a file where a folder should be")
    assert main(command) != 0
    said = capsys.readouterr().err
    assert "cannot be kept" in said and "FNENGINE_CACHE" in said
