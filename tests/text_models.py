"""A tokenizer for random models: every id is one visible character, so that text and ids can be compared by eye."""

from __future__ import annotations

from fnengine.host.tokenizer import Decoding, Tokenizer


def byte_tokenizer(vocab: int) -> Tokenizer:
    """Ids 0..vocab-1, each a distinct character; 0, 1 and 2 are special."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    letters = [chr(0x4E00 + i) for i in range(vocab)]
    backend = Backend(models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=letters[0]))
    backend.decoder = decoders.Fuse()
    return Tokenizer(backend, Decoding("byte_fallback"), frozenset({0, 1, 2}))
