"""Text of tokens as they come, although a character may need several of them."""

from __future__ import annotations

from ham.train.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text piece by piece; the pieces together are the text of all tokens.

    A character whose bytes are not all there decodes as one U+FFFD at the end. That one is held
    back until the next token shows what it is.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = 0

    def push(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        settled = text.removesuffix(REPLACEMENT)
        piece = settled[self._shown :]
        self._shown = max(self._shown, len(settled))
        if settled and settled == text:
            # Begin anew, so that a long text is not decoded again and again. The last token stays:
            # some tokenizers drop the blank before the first word of what they decode.
            self._window = [token]
            self._shown = len(self._tokenizer.decode(self._window))
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._tokenizer.decode(self._window)[self._shown :]
        self._window, self._shown = [], 0
        return piece
