"""Corpus, tokenizers, token shards, training loop and its resumable state."""
