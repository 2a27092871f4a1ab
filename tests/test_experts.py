"""Families with experts beyond what test_families.py compares: as values of a runtime, in both forms of a checkpoint,
and what a step reads. Oracles: transformers' own class in float32, a plain loop over experts, the pages that a product
touches. Mutants of each part of the routing must be caught."""

from __future__ import annotations

import dataclasses
import mmap
import re
import shutil
from pathlib import Path

import pytest
import torch

import fnengine as fn
from fnengine import checkpoint, experts, leaves, packed, params, tree
from fnengine.errors import CheckpointError, ConfigError, SpecError
from fnengine.experts import Experts, TiledExperts
from fnengine.families import spec_from_config
from fnengine.kernels import BACKENDS, cpu, linear
from fnengine.layers import moe, route
from fnengine.spec import MoE
from tests import family_laws as laws
from tests.family_laws import oracle, tokens
from tests.models import TINY, Paged, dense_ops, threads, tiny_folder, tiny_model, upstream
from tests.test_families import TOLERANCE, worst

CPU = torch.device("cpu")
SPARSE = [name for name in TINY if re.search("moe|mixtral|gpt-oss|deepseek|llama4", name)]


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.mark.parametrize("name", SPARSE)
def test_a_runtime_gives_the_logits_of_transformers(name: str):
    """The laws of families, in steps of few tokens."""
    rt = laws.runtime(tiny_model(name), max_num_batched_tokens=24)
    laws.logits_are_those_of_transformers(name, rt, 2e-5)  # seen are 2e-6
    laws.a_greedy_text_is_that_of_transformers(name, rt)


def mutate(name: str, **change: object):
    """The spec with a part of every layer's experts, or of its attention, changed."""
    spec = tiny_model(name).spec

    def other(layer):
        here = "mixer" if set(change) <= {f.name for f in dataclasses.fields(layer.mixer)} else "mlp"
        if here == "mlp" and not isinstance(layer.mlp, MoE):
            return layer
        return dataclasses.replace(layer, **{here: dataclasses.replace(getattr(layer, here), **change)})

    return dataclasses.replace(spec, layers=tuple(map(other, spec.layers)))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mixtral", {"normalized": False}),
        ("mixtral", {"scores": "sigmoid"}),
        ("mixtral", {"chosen": 1}),
        ("qwen3-moe", {"normalized": False}),
        ("qwen2-moe", {"normalized": True}),
        ("qwen2-moe", {"shared_gate": False}),
        ("qwen2-moe", {"shared": 0}),
        ("olmoe", {"clip": 0.0}),
        ("glm4-moe", {"correction": False}),
        ("glm4-moe", {"kept": 4}),
        ("glm4-moe", {"factor": 1.0}),
        ("glm4-moe", {"scores": "softmax"}),
        ("glm4-moe", {"groups": 2, "kept": 1}),
        ("phimoe", {"near": 0.02}),
        ("deepseek-v2", {"best": 2}),
        ("deepseek-v2", {"kept": 4}),
        ("deepseek-v2", {"normalized": True}),
        ("deepseek-v2", {"scale": 20**-0.5}),
        ("deepseek-v3", {"best": 1}),
        ("llama4", {"early": False}),
        ("llama4", {"scores": "logits"}),
        ("llama4", {"chunk": 0}),
        ("llama4", {"chunk": 16}),
        ("llama4", {"rope": None}),
        ("llama4", {"qk_norm": False}),
        ("deepseek-v3", {"correction": False}),
        ("phimoe", {"scores": "logits"}),
        ("gpt-oss", {"limit": 7.0}),
        ("gpt-oss", {"scores": "softmax", "normalized": False}),
        ("gpt-oss", {"sinks": False}),
    ],
    ids=str,
)
def test_mutants_are_caught(name: str, change: dict):
    ids = tokens(41)
    (got,) = Paged.make(tiny_model(name), dense_ops()).extend([(2, ids)], spec=mutate(name, **change))
    assert worst(got, oracle(name, ids)) > 10 * TOLERANCE


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe"])
def test_fused_checkpoints_hold_the_same_weights(name: str, tmp_path: Path):
    """As transformers saves them when it is told not to convert. Oracle: the tree from a name an expert."""
    upstream(name).save_pretrained(tmp_path, save_original_format=False)
    want = tiny_model(name).params["layers"]
    got = fn.load(tmp_path, dtype="float32", device="cpu").params["layers"]
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a["experts_gate_up"].weight, b["experts_gate_up"].weight)
        assert torch.equal(a["experts_down"].weight, b["experts_down"].weight)
    spec = dataclasses.replace(tiny_model(name).spec, layers=tiny_model(name).spec.layers[:1])
    with pytest.raises(CheckpointError, match=r"layers\.1\..* belongs to nothing"):
        checkpoint.load(tmp_path, spec, torch.float32, CPU, leaves.Packing("dense", "test"))


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path):
    """GLM's checkpoints have one more layer than the config counts."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder("glm4-moe"), tmp_path / "m"))
    held = load_file(folder / "model.safetensors")
    save_file({**held, "model.layers.2.enorm.weight": torch.ones(64)}, folder / "model.safetensors")
    spec = checkpoint.read_spec(folder)
    checkpoint.load(folder, spec, torch.float32, CPU, leaves.Packing("dense", "test"))
    save_file({**held, "model.layers.1.enorm.weight": torch.ones(64)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.enorm"):
        checkpoint.load(folder, spec, torch.float32, CPU, leaves.Packing("dense", "test"))


def test_a_missing_expert_is_named(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_folder("mixtral"), tmp_path / "m"))
    held = load_file(folder / "model.safetensors")
    del held["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.block_sparse_moe\.experts\.3\.w3\.weight is missing"):
        fn.load(folder, dtype="float32", device="cpu")


def test_the_final_form_of_experts_is_kept(tmp_path: Path, monkeypatch):
    """As `fnengine compile` keeps it. Oracle: the tree that was made from the checkpoint."""
    monkeypatch.setattr(packed, "folder", lambda: tmp_path)
    folder, want = tiny_folder("qwen2-moe"), tiny_model("qwen2-moe", "bfloat16")
    kept = checkpoint.keep(folder, want.spec, torch.bfloat16, CPU)
    if isinstance(kept, str):
        pytest.skip(kept)
    got = fn.load(folder, dtype="bfloat16", device="cpu")
    assert str(kept[0]) in got.notes[-1]
    for (path, a), (_, b) in zip(tree.items(want.params), tree.items(got.params), strict=True):
        assert torch.equal(a, b), path


def test_quantization_of_experts_is_refused():
    with pytest.raises(ConfigError, match="int8: weights of experts are not rounded yet, and Mixtral"):
        fn.load(tiny_folder("mixtral"), device="cpu", quantization="int8")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("gpt-oss", {"quantization_config": {"quant_method": "mxfp4"}}, ["stored quantized (mxfp4)", "unquantized"]),
        ("gpt-oss", {"swiglu_alpha": 2.0}, ["swiglu_alpha", "1.702"]),
        ("phimoe", {"num_experts_per_tok": 3}, ["num_experts_per_tok", "3", "only 2"]),
        ("mixtral", {"num_experts_per_tok": 9}, ["num_experts_per_tok", "9", "more than there are experts, 5"]),
        ("glm4-moe", {"n_group": 3}, ["n_group", "does not divide n_routed_experts = 8"]),
        ("qwen2-moe", {"use_sliding_window": True}, ["use_sliding_window", "is not implemented"]),
    ],
    ids=str,
)
def test_configs_that_cannot_be_built_say_why(name: str, change: dict, says: list[str]):
    with pytest.raises(SpecError) as e:
        spec_from_config({**checkpoint.read_json(tiny_folder(name) / "config.json"), **change})
    assert all(part in str(e.value) for part in says), str(e.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_ledger_counts_experts(dtype: torch.dtype):
    """Oracle: the loaded tree, in tiles and as stored."""
    folder = tiny_folder("qwen2-moe")
    spec = checkpoint.read_spec(folder)
    for how in (leaves.packing(CPU, dtype), leaves.Packing("dense", "test")):
        loaded = checkpoint.load(folder, spec, dtype, CPU, how)
        held = sum(
            leaves.weight_bytes(x) if isinstance(x, leaves.KINDS) else x.nbytes
            for _, x in tree.items(loaded, stop=leaves.KINDS)
        )
        plan = params.memory_plan(spec, dtype, how)
        assert plan.weights == held and plan.peak >= held
        assert isinstance(loaded["layers"][0]["experts_down"], TiledExperts if how.experts else Experts)
    assert params.count(spec) == sum(p.numel() for p in upstream("qwen2-moe").parameters())


def test_an_architecture_may_have_two_names():
    """Phi-3.5-MoE was published with its own code, which spells it otherwise than transformers."""
    config = checkpoint.read_json(tiny_folder("phimoe") / "config.json")
    assert spec_from_config({**config, "architectures": ["PhiMoEForCausalLM"]}) == spec_from_config(config)


# ---- routing and products --------------------------------------------------------------------------------------------


def small(dtype: torch.dtype = torch.float32, **more):
    """(an MoE, its params, tokens) with a router of two equal rows."""
    g = torch.Generator().manual_seed(0)
    m = MoE(6, 2, 40, **more)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=g) / shape[-1] ** 0.5).to(dtype)

    router = random(6, 64)
    router[4] = router[1]
    atom = linear.atom_of(dtype) if cpu.linear.supports(CPU, dtype) is None else 0
    p = {
        "router": leaves.tile_leaf(leaves.Dense(router), atom) if atom else leaves.Dense(router),
        "experts_gate_up": experts.place(Experts(random(6, 80, 64)), atom),
        "experts_down": experts.place(Experts(random(6, 64, 40)), atom),
    }
    return m, p, random(33, 64) * 8


def test_of_equal_experts_the_first_is_chosen_and_nan_harms_no_other_row():
    m, p, x = small()
    chosen, weight = route(m, p, x)
    assert (chosen == 1).any() and not any(4 in row and 1 not in row for row in chosen.tolist())
    assert torch.allclose(weight.sum(1), torch.ones(33))
    slot = torch.full((33,), 99)
    want = moe(m, p, slot, x)
    x = x.clone()
    x[7] = float("nan")
    got = moe(m, p, slot, x)
    keep = torch.arange(33) != 7
    assert torch.equal(got[keep], want[keep]) and got[7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_token_is_its_own_whoever_shares_its_expert(dtype: torch.dtype):
    """Law: the bits of a row alone, among all, and among copies of itself, which all go to its experts."""
    m, p, x = small(dtype)
    slot = torch.full((200,), 99)
    whole = moe(m, p, slot[:33], x)
    for i in (0, 5, 32):
        assert torch.equal(moe(m, p, slot[:1], x[i : i + 1])[0], whole[i])
        crowd = moe(m, p, slot[:100], x[i].expand(100, -1))
        assert torch.equal(crowd, whole[i].expand(100, -1))


def test_padding_costs_no_expert():
    """Tokens in the null block go where the first token goes; the first token's bits are as without them."""
    m, p, x = small()
    seen: list[int] = []
    original = experts.arrange

    def arrange(expert, n):
        seen.append(len(set(expert.tolist())))
        return original(expert, n)

    slot = torch.tensor([40, *[3] * 32])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "arrange", arrange)
        padded = moe(m, p, slot, x)
        moe(m, p, slot + 99, x)
    assert seen[0] == 2 < seen[1]
    assert torch.equal(padded[0], moe(m, p, slot[:1], x[:1])[0])


def touched(tiles: mmap.mmap, begin: int) -> int:
    """Bytes of the mapping that begins at an address, as far as this process has touched it."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = int(line.split("-")[0], 16) == begin
        elif found and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the mapping is not listed")


def test_a_step_reads_the_weights_of_routed_experts_only(tmp_path: Path):
    """Oracle: pages. Tiles lie in a file of which no page is mapped; a product maps those it reads."""
    if cpu.grouped_tiles.supports(CPU, torch.float32):
        pytest.skip("no native code")
    E, N, K = 8, 1024, 1024  # 4 MiB an expert, of which a page may be half
    file = tmp_path / "tiles"
    file.write_bytes(torch.randn(E, N // 32, K, 32).numpy().tobytes())
    with file.open("r+b") as opened:
        memory = mmap.mmap(opened.fileno(), 0)
    tiles = torch.frombuffer(memory, dtype=torch.float32).view(E, N // 32, K, 32, 1)
    if linear.atom_of(torch.float32) != 1:
        pytest.skip("another layout")
    x, offsets = torch.randn(3, K), torch.tensor([0, 0, 1, 1, 1, 1, 3, 3, 3]).int()
    before = touched(memory, tiles.data_ptr())
    y = cpu.grouped_tiles.fn(x, offsets, tiles, None, N)
    read = touched(memory, tiles.data_ptr()) - before
    assert 8 << 20 <= read <= 12 << 20, f"{read} bytes of {4 * E} MiB"
    for row, expert in ((0, 1), (1, 5), (2, 5)):
        assert torch.equal(y[row], cpu.linear.fn(x[row : row + 1], tiles[expert], None, N)[0])


def test_nan_is_the_largest_as_for_torch():
    score = torch.tensor([[1.0, float("nan"), 3.0, -float("nan")]])
    for b in BACKENDS["top_experts"]:
        if b.supports(CPU, torch.float32) is None:
            assert b.fn(score, 3).tolist() == [[1, 3, 2]]
