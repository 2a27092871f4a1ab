"""transformers' static `generate` as a peer: one padded batch, greedy, end of sequence ignored.

    python -m benchmarks.peer_transformers --model FOLDER --dtype bfloat16 --threads 2

A folder with weights is loaded; one with only a config.json gets random weights of that shape.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = str(args.threads)

    import torch
    import transformers

    from benchmarks.peers import serve_protocol

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    began = time.perf_counter()
    folder = Path(args.model)
    weights = any(folder.glob("*.safetensors"))
    if weights:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    else:
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to(dtype).eval()
    generation = transformers.GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0)
    model.generation_config = generation

    def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        assert len({len(p) for p in prompts}) == 1, "the workloads' batches have prompts of one length"
        start = time.perf_counter()
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            tokens = out[:, ids.shape[1] :].tolist()
        return time.perf_counter() - start, tokens

    hello = {
        "name": "transformers",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "attention": model.config._attn_implementation,
        "load_seconds": time.perf_counter() - began,
        "same_weights": weights,
    }
    serve_protocol(hello, generate)


if __name__ == "__main__":
    main()
