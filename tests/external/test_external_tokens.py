"""Tokenizers of other libraries: every token has its bytes, and texts are encoded again."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from ham.evaluate.word_classes import Spelling
from ham.train.retokenise import retokenise
from ham.train.shards import TokenShard
from ham.train.tokenizer import ByteTokenizer, VocabularyTokenizer, load_tokenizer


def sentencepiece_like() -> str:
    """A BPE of characters with byte fallback that writes a space as U+2581, as Llama's does."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: number for number, token in enumerate([*spelled, "<unk>", "▁", *"abcé"])}
    # A number far away, as in vocabularies with gaps.
    library = Library(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence(steps)
    library.add_special_tokens(["</s>"])
    return library.to_str()


def test_bytes_of_sentencepiece_tokens_are_exact() -> None:
    tokenizer = VocabularyTokenizer("own", sentencepiece_like())
    text = "a cab → é b"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    # A part that begins with a space: decoded alone it could lose it.
    assert tokenizer.count_bytes(ids[1:]) == len(text[1:].encode())
    assert tokenizer.count_bytes([tokenizer.end_of_text]) == 0


def test_bytes_of_word_pieces_have_their_spaces() -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "[SEP]", "a", "cab", "##s"])}
    library = Library(models.WordPiece(words, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    library.add_special_tokens(["[SEP]"])
    tokenizer = VocabularyTokenizer("own", library.to_str())
    ids = tokenizer.encode("a cabs cab")
    assert tokenizer.decode(ids) == "a cabs cab"
    assert [len(part) for part in Spelling(tokenizer)(ids[1:])] == [len(" cab"), 1, len(" cab")]


def test_texts_are_encoded_again(data: Path, foreign: Path, texts: list[str], capsys) -> None:
    shard = TokenShard.open(data / "test.tokens")
    own = load_tokenizer("own", foreign)
    made = retokenise(shard, ByteTokenizer(), own)
    assert [own.decode(document) for document in made.documents()] == texts
    assert made.byte_count == shard.byte_count
    assert made.tokens[made.document_offsets[1:] - 1].tolist() == [own.end_of_text] * len(texts)
    assert not capsys.readouterr().err
    # Its alphabet lacks most letters, and without byte fallback they are lost.
    lossy = sentencepiece_like().replace('"byte_fallback":true', '"byte_fallback":false')
    retokenise(shard, ByteTokenizer(), VocabularyTokenizer("own", lossy))
    assert "bits per byte do not compare" in capsys.readouterr().err
