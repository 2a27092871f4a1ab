"""A model folder ready to be benchmarked, and its sizes.

A folder under `benchmarks/configs/` holds a config.json and nothing else. Serving needs a tokenizer too, and its cost
should be that of a real one, so one is made: a byte-level BPE with as many tokens as the model has, whose longer
tokens are strings of letters.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import shutil
import string
from pathlib import Path

from benchmarks.floor import Shape

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
ROUNDED = {"int8": (8.125 / 8, 8.125 / 8), "int4": (4.5 / 8, 8.125 / 8)}
"""Bytes of a parameter of the body and of the head, scales included (kernels/quantized.py)."""


def prepare(name: str) -> tuple[Path, str]:
    """(folder, load format) of a model: `demo`, or a folder with or without weights and tokenizer.

    Without weights the load format is `dummy`. Without a tokenizer the folder is a copy that has one, kept in the
    cache folder.
    """
    from fnengine import environment, hub

    folder = hub.resolve(name, progress=False)
    load_format = "auto" if any(folder.glob("*.safetensors")) else "dummy"
    if (folder / "tokenizer.json").exists():
        return folder, load_format
    assert load_format == "dummy", f"{folder} has weights and no tokenizer.json"
    config = (folder / "config.json").read_bytes()
    key = hashlib.sha256(config + inspect.getsource(made_tokenizer).encode()).hexdigest()[:12]
    made = environment.cache_dir() / "benchmarks" / f"{folder.name}-{key}"
    if not (made / "tokenizer.json").exists():
        made.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "config.json", made / "config.json")
        partial = made / "tokenizer.partial"
        partial.write_text(json.dumps(made_tokenizer(json.loads(config)["vocab_size"]), ensure_ascii=False))
        partial.rename(made / "tokenizer.json")
    return made, load_format


def made_tokenizer(size: int) -> dict:
    """tokenizer.json of a byte-level BPE with `size` tokens: the bytes, then pairs and triples of letters and space.

    Every triple is merged from a pair and a letter, so there is a merge for each token beyond the bytes, as in a real
    one. Fewer than 257 tokens get only bytes.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = string.ascii_letters + "\u0120"  # the byte-level stand-in for a space
    tokens = sorted(ByteLevel.alphabet())[:size]
    merges: list[list[str]] = []
    pairs = [a + b for a, b in itertools.product(letters, letters)]
    longer = itertools.chain(
        ((p, list(p)) for p in pairs),
        ((p + c, [p, c]) for p, c in itertools.product(pairs, letters)),
        ((p + q, [p, q]) for p, q in itertools.product(pairs, pairs)),
    )
    for token, parts in itertools.islice(longer, max(0, size - len(tokens))):
        tokens.append(token)
        merges.append(parts)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


def measure(folder: Path, dtype: str, quantization: str = "none") -> tuple[Shape, int, int]:
    """(sizes, vocabulary, longest sequence) of the model in a folder; `dtype` is bfloat16, float16 or float32."""
    from fnengine import checkpoint, params
    from fnengine.spec import kv_bytes_per_token, routed

    spec = checkpoint.read_spec(folder)
    shares = {m.chosen / m.experts for layer in spec.layers if (m := routed(layer.mlp)) is not None}
    every = list(params.arrays(params.abstract(spec)))
    looked_up = sum(info.size for path, info in every if path == "inputs")
    stacked = [info.size for _, info in every if len(info.shape) == 3]
    head = spec.vocab * spec.width
    item = ITEMSIZE[dtype]
    body, end = ROUNDED.get(quantization, (item, item))
    shape = Shape(
        body=params.count(spec) - looked_up - head * (1 if spec.tied else 2),
        head=head,
        itemsize=body,
        head_itemsize=end,
        kv_token=kv_bytes_per_token(spec, item),
        attention=sum(layer.mixer.heads * layer.mixer.width for layer in spec.layers),
        experts=sum(stacked),
        routed=max(shares, default=1.0),
    )
    return shape, spec.vocab, spec.max_len


def own_dtype(folder: Path, dtype: str) -> str:
    """`dtype`, or for `auto` what the engine takes on this machine."""
    if dtype != "auto":
        return dtype
    from fnengine import checkpoint

    spec = checkpoint.read_spec(folder)
    return str(checkpoint.pick_dtype(spec, "auto", checkpoint.pick_device("auto"))[0]).removeprefix("torch.")
