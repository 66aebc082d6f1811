"""This project's tokenizers as `PreTrainedTokenizerFast`.

Both give the same token numbers for every text. As in `ham.train.tokenizer`, no special token is
ever added, and the spelling of one inside a text is plain text.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from ham.train.tokenizer import END_OF_TEXT, TOKENIZER_FILE, ByteTokenizer, Tokenizer


def fast_tokenizer(tokenizer: Tokenizer, max_positions: int) -> PreTrainedTokenizerFast:
    """The same tokenizer with the methods that tools around transformers call.

    End of text is also the padding token; padding goes to the left, as generation needs it.

    Args:
        tokenizer: A tokenizer of this project.
        max_positions: Longest sequence of the model, in tokens.
    """
    library = byte_library() if isinstance(tokenizer, ByteTokenizer) else _plain_copy(tokenizer)
    end_of_text = library.id_to_token(tokenizer.end_of_text)
    return PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token=end_of_text,
        pad_token=end_of_text,
        padding_side="left",
        model_max_length=max_positions,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def byte_library() -> Library:
    """The byte tokenizer for the `tokenizers` library: a byte-level BPE without merges."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    vocabulary[END_OF_TEXT] = ByteTokenizer.end_of_text
    library = Library(BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = ByteLevelDecoder()
    library.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return library


def byte_characters() -> list[str]:
    """How a byte-level vocabulary spells each byte: itself if printable, else from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _plain_copy(tokenizer: Tokenizer) -> Library:
    """A copy that neither adds special tokens nor truncates nor pads."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        definition: dict[str, Any] = json.loads((Path(folder) / TOKENIZER_FILE).read_text("utf-8"))
    definition.update(post_processor=None, truncation=None, padding=None)
    return Library.from_str(json.dumps(definition))
