"""The held-out texts of an experiment in the tokens of a model that was trained elsewhere.

A shard holds tokens, so its documents are decoded with the tokenizer that made it and encoded
again. That is exact for tokenizers that spell every byte, as the project's own do.
"""

from __future__ import annotations

import sys

import numpy as np

from ham.train.shards import TokenShard, token_dtype
from ham.train.tokenizer import Tokenizer

_AT_ONCE = 1000
"""Documents that are encoded together."""

_LOSSY_SHARE = 0.001
"""From this share of bytes on, a difference between texts and tokens is worth a warning."""


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give every text the same token numbers."""
    return type(one) is type(other) and one.definition == other.definition


def retokenise(shard: TokenShard, made_by: Tokenizer, tokenizer: Tokenizer) -> TokenShard:
    """The documents of a shard, encoded by another tokenizer; in memory.

    Warns where the tokens do not stand for as many bytes as the texts have: bits per byte do not
    compare with those of other tokenizers then.

    Args:
        shard: The shard.
        made_by: The tokenizer that made it.
        tokenizer: The tokenizer to encode with.
    """
    texts = [made_by.decode(document) for document in shard.documents()]
    offsets, parts, counted = [0], [], 0
    for start in range(0, len(texts), _AT_ONCE):
        for tokens in tokenizer.encode_documents(texts[start : start + _AT_ONCE]):
            counted += tokenizer.count_bytes(tokens)
            parts += [tokens, [tokenizer.end_of_text]]
            offsets.append(offsets[-1] + len(tokens) + 1)
    size = sum(len(text.encode("utf-8")) for text in texts)
    if abs(counted - size) > _LOSSY_SHARE * size:
        print(
            f"ham: warning: tokens of {tokenizer.name!r} stand for {counted:,} bytes, the texts "
            f"have {size:,}: bits per byte do not compare with those of other tokenizers",
            file=sys.stderr,
        )
    dtype = token_dtype(tokenizer.vocabulary_size)
    return TokenShard(
        tokens=np.concatenate(parts).astype(dtype) if parts else np.empty(0, dtype),
        document_offsets=np.array(offsets, dtype=np.int64),
        byte_count=size,
        tokenizer_name=tokenizer.name,
        vocabulary_size=tokenizer.vocabulary_size,
        end_of_text=tokenizer.end_of_text,
        sha256="",
    )
