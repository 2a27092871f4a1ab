"""llama.cpp's convert_hf_to_gguf.py on a model whose tokenizer it does not know.

    python -m benchmarks.convert_gguf TREE FOLDER TYPE FILE.gguf

TREE is llama.cpp's source. It recognises tokenizers by a digest of their output and refuses others; prompts are token
ids here, so any name of a pre-tokenizer serves. It also imports sentencepiece before it looks whether the folder has
such a tokenizer; ours never do.
"""

from __future__ import annotations

import importlib
import runpy
import sys
from pathlib import Path


def main() -> None:
    tree, folder, kind, file = sys.argv[1:]
    sys.path[:0] = [str(Path(tree) / "gguf-py"), tree]
    base = importlib.import_module("conversion.base")

    def absent(self: object) -> None:
        raise FileNotFoundError("no tokenizer.model")

    for held in vars(base).values():
        if isinstance(held, type) and hasattr(held, "get_vocab_base_pre"):
            held.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"  # pyright: ignore
            held._set_vocab_sentencepiece = absent  # pyright: ignore
    script = str(Path(tree) / "convert_hf_to_gguf.py")
    sys.argv = [script, folder, "--outtype", kind, "--outfile", file]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
