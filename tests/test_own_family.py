"""Families outside of the tree: a user's file registers, and everything that reads a config knows it.

Oracle: transformers' Llama, whose weights a family of another name reads.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import fnengine as fn
from fnengine import cli, families
from fnengine.cli import own
from fnengine.errors import ConfigError, SpecError
from fnengine.families import FAMILIES, llama
from tests.models import tiny_folder, upstream

OWN = """
import dataclasses
from fnengine.families import llama
from fnengine.families.names import Family, IGNORED, NAMES


def read(config, where="config.json"):
    spec = llama.read(config, where)
    return dataclasses.replace(spec, family="own_llama", architecture="OwnLlamaForCausalLM")


FAMILY = Family("own_llama", "OwnLlamaForCausalLM", read, NAMES, IGNORED)
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(families, "FAMILIES", FAMILIES)
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "model"
    shutil.copytree(tiny_folder("llama31"), found)
    config = json.loads((found / "config.json").read_text())
    config = {**config, "architectures": ["OwnLlamaForCausalLM"], "model_type": "own_llama"}
    (found / "config.json").write_text(json.dumps(config))
    (tmp_path / "own_llama.py").write_text(OWN)
    return found


def logits(model) -> torch.Tensor:
    rt = fn.Runtime(model, max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    return rt.extend(rt.empty, list(range(3, 30)), logits="all")[1]


def test_a_file_that_the_command_line_names(folder: Path, capsys):
    with pytest.raises(SpecError, match=r"OwnLlamaForCausalLM.*nearest is LlamaForCausalLM, and transformers has no"):
        fn.load(folder)
    file = str(folder.parent / "own_llama.py")
    for _ in range(2):  # a second time changes nothing
        assert cli.main(["plan", str(folder), "--family", file, "--memory", "4GiB", "--max-model-len", "64"]) == 0
    capsys.readouterr()
    with torch.no_grad():
        want = upstream("llama31")(torch.arange(3, 30)[None]).logits[0]
    torch.testing.assert_close(logits(fn.load(folder, dtype="float32")), want, rtol=1e-4, atol=1e-4)
    assert cli.main(["models"]) == 0
    assert "OwnLlamaForCausalLM" in capsys.readouterr().out


def test_in_python(folder: Path):
    def read(config, where="config.json"):
        return dataclasses.replace(llama.read(config, where), family="own_llama", architecture="OwnLlamaForCausalLM")

    family = dataclasses.replace(llama.FAMILY, name="own_llama", architecture="OwnLlamaForCausalLM", read=read)
    assert fn.register(family) is family
    assert fn.load(folder).spec.family == "own_llama"
    with pytest.raises(ConfigError, match="a family is called 'own_llama' already"):
        fn.register(dataclasses.replace(family, architecture="Other"))
    with pytest.raises(ConfigError, match="llama reads LlamaForCausalLM already"):
        fn.register(dataclasses.replace(family, name="other", architecture="LlamaForCausalLM"))


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("nowhere", "", "cannot import nowhere"),
        ("nowhere.py", None, "no such file"),
        ("empty.py", "", "holds no family"),
        ("broken.py", "1 / 0", "ZeroDivisionError"),
        ("odd.py", "FAMILY = 3", "holds no family"),
    ],
)
def test_what_is_no_family_is_refused(tmp_path: Path, monkeypatch, name: str, text: str | None, why: str):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=why):
        own.families([name])


def test_models_lists_who_computes_what(capsys):
    """Oracle: the registry, and transformers' own table."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as table

    assert cli.main(["models", "--fallback"]) == 0
    status = {line.split()[1]: line.split()[2] for line in capsys.readouterr().out.splitlines()}
    assert status["LlamaForCausalLM"] == "native" and status["PersimmonForCausalLM"] == "fallback"
    named = {n for v in table.values() for n in ((v,) if isinstance(v, str) else v)}
    assert set(status) == named | {f.architecture for f in FAMILIES.values()}
