"""A family of one's own: a config becomes a spec, and names say where the weights are. No file of the engine changes.

python examples/own_family.py        fnengine serve FOLDER --family examples/own_family.py
"""

import json
import logging
import tempfile
from pathlib import Path

import fnengine as fn
from fnengine.families.fields import Fields, kv_heads, model_spec, rope
from fnengine.families.names import IGNORED, NAMES, Family
from fnengine.spec import Attention, Layer, Mlp


def read(config, where="config.json"):
    """Llama with a window in every other layer and squared ReLU without a gate."""
    f = Fields(config, where)
    D, L, H = f.integer("hidden_size"), f.integer("num_hidden_layers"), f.integer("num_attention_heads")
    K, C, longest = kv_heads(f, H), D // H, f.integer("max_position_embeddings", 4096)
    turning, mlp = rope(f, C, longest), Mlp(f.integer("intermediate_size"), "relu2", gated=False)
    window, eps = f.integer("sliding_window", 1024), f.number("rms_norm_eps", 1e-6)
    layers = tuple(
        Layer(Attention(H, K, C, turning, C**-0.5, window=window if i % 2 else None), mlp, eps) for i in range(L)
    )
    return model_spec(f, "striped", "StripedForCausalLM", layers, width=D, max_len=longest, tied=True)


FAMILY = Family("striped", "StripedForCausalLM", read, {**NAMES, "up": "model.layers.{i}.mlp.up_proj"}, IGNORED)


def main():
    fn.register(FAMILY)
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=512)
    config = {"architectures": ["StripedForCausalLM"], **sizes, "intermediate_size": 192, "sliding_window": 8}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        model = fn.load(folder, load_format="dummy")
    logging.getLogger("fnengine").setLevel(logging.ERROR)  # it would say that nothing is compiled
    rt = fn.Runtime(model, max_num_seqs=2, max_model_len=64, kv_cache_memory_bytes=1 << 20, enforce_eager=True)
    seq, tokens = rt.empty, [3, 1, 4, 1, 5]
    for _ in range(8):
        seq, token = rt.extend(seq, tokens, sample=fn.Sampling(seed=7))
        tokens = [token]
    print(f"{model.spec.architecture}: windows {[k.mixer.window for k in model.spec.layers]}, tokens {seq.tokens[5:]}")


if __name__ == "__main__":
    main()
