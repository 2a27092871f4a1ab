"""llama.cpp as a peer, through its C interface: one `llama_decode` a step for all sequences, the greedy token by NumPy.

    python -m benchmarks.peer_llamacpp --model FILE.gguf --dtype bfloat16 --threads 2 --max-len 1024 --rows 32

Run by the Python that `benchmarks.install_peers` made for it. Each sequence has a KV cache of its own (not one unified
cache, in which every token meets the others' keys too, masked). A prefix that all prompts share is computed once and
copied to the other sequences' caches.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.peers import adapter_arguments, serve_protocol

BATCH, MICROBATCH = 2048, 512
"""Most tokens of a call and of a pass over the weights: llama.cpp's defaults."""
KV = {"bfloat16": "GGML_TYPE_F16", "float16": "GGML_TYPE_F16", "float32": "GGML_TYPE_F32"}
"""float16 is llama.cpp's default; it has the size of bfloat16."""


class Sequences:
    """A model and a context of `rows` sequences.

    Args:
        lib: the module of llama.cpp's bindings.
    """

    def __init__(self, lib: Any, model: str, dtype: str, threads: int, max_len: int, rows: int):
        import numpy as np

        self.lib, self.np = lib, np
        lib.llama_backend_init()
        with_defaults = lib.llama_model_default_params()
        with_defaults.n_gpu_layers = 0
        loaded = lib.llama_model_load_from_file(model.encode(), with_defaults)
        assert loaded, f"llama.cpp cannot load {model}"
        p = lib.llama_context_default_params()
        p.n_ctx, p.n_seq_max = max_len * rows, rows
        p.n_batch, p.n_ubatch = BATCH, MICROBATCH
        p.n_threads = p.n_threads_batch = threads
        p.type_k = p.type_v = getattr(lib, KV[dtype])
        p.kv_unified = False
        p.no_perf = True
        self.context = lib.llama_init_from_model(loaded, p)
        assert self.context, f"llama.cpp cannot make a context of {rows} x {max_len} tokens"
        self.memory = lib.llama_get_memory(self.context)
        self.vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(loaded))
        self.batch = lib.llama_batch_init(BATCH, 0, 1)

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """`new` greedy tokens for every prompt."""
        self.lib.llama_memory_clear(self.memory, False)
        shared = self._share(prompts)
        tokens = [(t, at, row, at == len(p) - 1) for row, p in enumerate(prompts) for at, t in enumerate(p)]
        found = self._decode([one for one in tokens if one[1] >= shared])
        out = [[found[row]] for row in range(len(prompts))]
        for step in range(new - 1):
            found = self._decode([(o[-1], len(prompts[row]) + step, row, True) for row, o in enumerate(out)])
            for row, o in enumerate(out):
                o.append(found[row])
        return out

    def _share(self, prompts: list[list[int]]) -> int:
        """How many first tokens are in every sequence's cache now: those that all prompts have in common."""
        if len(prompts) == 1:
            return 0
        columns = zip(*(p[:-1] for p in prompts), strict=False)
        shared = next((i for i, c in enumerate(columns) if len(set(c)) > 1), min(map(len, prompts)) - 1)
        if shared:
            self._decode([(t, at, 0, False) for at, t in enumerate(prompts[0][:shared])])
            for row in range(1, len(prompts)):
                self.lib.llama_memory_seq_cp(self.memory, 0, row, -1, -1)
        return shared

    def _decode(self, tokens: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Computes (token, position, sequence, whether its logits are wanted); the likeliest next by sequence."""
        found: dict[int, int] = {}
        b, np = self.batch, self.np
        for first in range(0, len(tokens), BATCH):
            part = tokens[first : first + BATCH]
            b.n_tokens = len(part)
            for i, (token, position, row, wanted) in enumerate(part):
                b.token[i], b.pos[i], b.n_seq_id[i], b.seq_id[i][0], b.logits[i] = token, position, 1, row, wanted
            status = self.lib.llama_decode(self.context, b)
            assert status == 0, f"llama_decode gave {status} for {len(part)} tokens"
            for i, (_, _, row, wanted) in enumerate(part):
                if wanted:
                    logits = self.lib.llama_get_logits_ith(self.context, i)
                    found[row] = int(np.ctypeslib.as_array(logits, (self.vocab,)).argmax())
        return found


def main() -> None:
    args = adapter_arguments(__doc__, ("--quantization", {"default": "none", "help": "of the weights in the file"}))
    began = time.perf_counter()
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    sequences = Sequences(llama_cpp, args.model, args.dtype, args.threads, args.max_len, args.rows)

    def generate(prompts: list[list[int]], new: int) -> tuple[float, list[list[int]]]:
        start = time.perf_counter()
        tokens = sequences.generate(prompts, new)
        return time.perf_counter() - start, tokens

    hello = {
        "name": "llama.cpp",
        "versions": {"llama-cpp-python": llama_cpp.__version__},
        "settings": {
            "file": os.path.basename(args.model),
            "kv": KV[args.dtype],
            "n_batch": BATCH,
            "n_ubatch": MICROBATCH,
            "system": llama_cpp.llama_print_system_info().decode(),
        },
        "load_seconds": time.perf_counter() - began,
        "same_weights": args.weights == "given" and args.quantization == "none",
    }
    serve_protocol(hello, generate)


if __name__ == "__main__":
    main()
