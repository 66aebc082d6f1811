"""Tokenizers: bytes, a byte-pair encoding trained on the corpus, or one of the Hugging Face hub.

All of them share one interface, `Tokenizer`. Text is encoded without special tokens and, where the
text itself contains the spelling of a special token, as plain text. `end_of_text` separates
documents in a token shard; it stands for no bytes, so that bits per byte compare across tokenizers.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ham.errors import ConfigError, CorruptFileError, MissingDataError, unknown_choice
from ham.files import read_json, write_text

TOKENIZER_FILE = "tokenizer.json"
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
BPE_NAME = "bpe-4096"
OWN_NAME = "own"
"""The `tokenizer.json` beside the weights of a model that was trained elsewhere."""

BPE_VOCABULARY_SIZE = 4096

_END_OF_TEXT_SPELLINGS = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|im_end|>",
    "[SEP]",
)


_SPACE = "\u2581"
_LONE_BYTE = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer(ABC):
    """Maps text to token numbers and back.

    Attributes:
        name: What a configuration calls it.
        vocabulary_size: Number of token numbers, special tokens included.
        end_of_text: Number of the token that ends a document.
    """

    name: str
    vocabulary_size: int
    end_of_text: int
    definition: str = ""
    """Content of its `tokenizer.json`; empty where there is none."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`, without special tokens."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of token numbers; `end_of_text` stands for nothing."""

    @abstractmethod
    def count_bytes(self, ids: Iterable[int]) -> int:
        """UTF-8 bytes that these tokens stand for; 0 for `end_of_text`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what `load_tokenizer(name, folder)` needs."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token numbers of several texts (unsigned integers), faster than one by one."""
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]


class ByteTokenizer(Tokenizer):
    """Token numbers 0..255 are UTF-8 bytes, 256 is the end of a text."""

    name = "byte"
    vocabulary_size = 257
    end_of_text = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`."""
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of UTF-8 bytes; bytes that are not UTF-8 become U+FFFD."""
        kept = [int(token) for token in ids if token != self.end_of_text]
        if any(not 0 <= token < 256 for token in kept):
            raise ValueError(f"token numbers of the byte tokenizer are 0..256, received {kept}")
        return bytes(kept).decode("utf-8", errors="replace")

    def count_bytes(self, ids: Iterable[int]) -> int:
        """Number of tokens other than the end of a text."""
        return int(np.count_nonzero(_array(ids) != self.end_of_text))

    def save(self, folder: Path) -> None:
        """Bytes need no file."""

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The UTF-8 bytes of each text (uint8)."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8) for text in texts]


class VocabularyTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library.

    Args:
        name: What a configuration calls it.
        definition: Content of a `tokenizer.json`.
        end_of_text: Spelling of the token that ends a text; the first of the usual ones when None.

    Raises:
        ConfigError: If it has no token that ends a text.
        ValueError: If `definition` is not a tokenizer.
    """

    def __init__(self, name: str, definition: str, end_of_text: str | None = None):
        from tokenizers import Tokenizer as Library

        self.name = name
        self.definition = definition
        try:
            self._library = Library.from_str(definition)
        except Exception as error:  # the library raises bare Exception for any fault
            raise ValueError(str(error)) from error
        self._library.encode_special_tokens = True
        self._library.no_truncation()
        self._library.no_padding()
        self.vocabulary_size = self._library.get_vocab_size()
        spellings = _END_OF_TEXT_SPELLINGS if end_of_text is None else (end_of_text,)
        found = (self._library.token_to_id(spelling) for spelling in spellings)
        number = next((number for number in found if number is not None), None)
        if number is None:
            known = ", ".join(spellings)
            raise ConfigError(f"tokenizer {name!r} has no end-of-text token; looked for {known}")
        self.end_of_text = number

    def encode(self, text: str) -> list[int]:
        """Token numbers of `text`, without special tokens."""
        return self._library.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token numbers (uint32) of several texts, on all CPU threads and without offsets."""
        encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token numbers; special tokens stand for nothing."""
        return self._library.decode([int(token) for token in ids], skip_special_tokens=True)

    def count_bytes(self, ids: Iterable[int]) -> int:
        """UTF-8 bytes that these tokens stand for; exact where each token spells its bytes.

        Those are byte-level vocabularies and those of SentencePiece, which write a space as U+2581.
        """
        if self._bytes_per_token is None:
            return len(self.decode(ids).encode("utf-8"))
        return int(self._bytes_per_token[_array(ids)].sum())

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json`."""
        write_text(Path(folder) / TOKENIZER_FILE, self.definition)

    @cached_property
    def _bytes_per_token(self) -> np.ndarray | None:
        """Bytes of every token, or None where a token alone does not say."""
        decoder = json.dumps(json.loads(self.definition).get("decoder"), ensure_ascii=False)
        if '"ByteLevel"' in decoder:
            # Each byte is spelled as one character; added tokens are plain text.
            size_of = len
        elif _SPACE in decoder:
            size_of = _sentencepiece_bytes
        else:
            return None
        numbers = self._library.get_vocab(with_added_tokens=True)
        # Numbers may have gaps, so the largest can lie beyond the size of the vocabulary.
        sizes = np.zeros(max(numbers.values()) + 1, dtype=np.int64)
        for token, number in numbers.items():
            sizes[number] = size_of(token)
        for number, token in self._library.get_added_tokens_decoder().items():
            sizes[number] = 0 if token.special else len(token.content.encode("utf-8"))
        sizes[self.end_of_text] = 0
        return sizes


def train_bpe(
    texts: Iterable[str], vocabulary_size: int = BPE_VOCABULARY_SIZE, name: str = BPE_NAME
) -> VocabularyTokenizer:
    """Train a byte-level byte-pair encoding; the same texts give the same tokenizer.

    Args:
        texts: Training texts, each a document or a part of one.
        vocabulary_size: Most tokens to make, the 256 bytes and the end of a text included. A small
            text gives fewer.
        name: What a configuration calls it.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    library = Library(BPE())
    library.pre_tokenizer = ByteLevel(add_prefix_space=False)
    library.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(_paragraphs(texts), trainer)
    return VocabularyTokenizer(name, library.to_str())


def load_tokenizer(name: str, folder: Path | None = None) -> Tokenizer:
    """The tokenizer of that name.

    Args:
        name: `byte`, `bpe-4096`, `hub:NAME`, or `own` for the file beside a model's weights.
        folder: Data or checkpoint folder that holds `tokenizer.json`. `bpe-4096` needs it; a hub
            tokenizer is read from it, without the network, if the file is there.

    Raises:
        ConfigError: If there is no such tokenizer.
        MissingDataError: If its file, or a hub that has it, cannot be reached.
        CorruptFileError: If its file is not a tokenizer.
    """
    if name == ByteTokenizer.name:
        return ByteTokenizer()
    file = None if folder is None else Path(folder) / TOKENIZER_FILE
    if name not in (BPE_NAME, OWN_NAME) and not name.startswith("hub:"):
        raise unknown_choice("tokenizer", name, ("byte", BPE_NAME, "hub:NAME"))
    if file is not None and file.exists():
        end_of_text = _declared_end(file.parent) if name == OWN_NAME else None
        try:
            return VocabularyTokenizer(name, file.read_text(encoding="utf-8"), end_of_text)
        except ValueError as error:
            raise CorruptFileError(f"{file} is not a tokenizer: {error}") from error
    if name == OWN_NAME:
        raise MissingDataError(f"{file or TOKENIZER_FILE} does not exist")
    if name == BPE_NAME:
        raise MissingDataError(
            f"tokenizer {BPE_NAME} is trained by `ham prepare`; "
            f"{file or TOKENIZER_FILE} does not exist"
        )
    return VocabularyTokenizer(name, _download(name.removeprefix("hub:")))


def _declared_end(folder: Path) -> str | None:
    """The end-of-text token that `tokenizer_config.json` declares, if there is such a file."""
    path = folder / TOKENIZER_CONFIG_FILE
    declared = read_json(path).get("eos_token") if path.exists() else None
    return declared.get("content") if isinstance(declared, dict) else declared


def _sentencepiece_bytes(token: str) -> int:
    """Bytes of a token that writes a space as U+2581 and a lone byte as `<0xNN>`."""
    return 1 if _LONE_BYTE.fullmatch(token) else len(token.replace(_SPACE, " ").encode("utf-8"))


def _array(ids: Iterable[int]) -> np.ndarray:
    return np.asarray(ids if isinstance(ids, np.ndarray) else list(ids), dtype=np.int64)


def _download(hub_name: str) -> str:
    from tokenizers import Tokenizer as Library

    try:
        return Library.from_pretrained(hub_name).to_str()
    except Exception as error:  # the library raises bare Exception for any fault
        raise MissingDataError(
            f"cannot get tokenizer {hub_name!r} from the hub: {error}; check the name and the "
            "network, or use the tokenizer 'byte' or 'bpe-4096'"
        ) from error


def _paragraphs(texts: Iterable[str]) -> Iterator[str]:
    """Texts cut at blank lines: the trainer counts words, and short pieces bound its memory."""
    for text in texts:
        for paragraph in text.split("\n\n"):
            yield paragraph + "\n\n"
