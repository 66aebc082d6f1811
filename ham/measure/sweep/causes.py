"""Why a cell or a part of a step has no time, in one line that says enough to act on.

Errors of compilers come in many lines and in chains: the first line announces, the cause stands at
the end. So whole messages are kept, cut in the middle where they are too long.
"""

from __future__ import annotations

LIMIT = 600
HEAD = 200
GAP = " [...] "
ADVICE = (
    "Set TORCHDYNAMO_VERBOSE",
    "Set TORCH_LOGS",
    "For even more developer context",
    "You can suppress this exception",
    "import torch._dynamo",
    "torch._dynamo.config.suppress_errors",
)
"""How lines begin that torch adds to every message."""


def whole_cause(error: BaseException) -> str:
    """Type and message of an exception and of those that caused it, at most `LIMIT` characters."""
    told: list[str] = []
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        words = f"{type(link).__name__}: {_words(link)}"
        if not any(words in earlier for earlier in told):
            told.append(words)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return _cut(", caused by ".join(told))


def _words(error: BaseException) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return " ".join(line for line in lines if line and not line.startswith(ADVICE))


def _cut(text: str) -> str:
    if len(text) <= LIMIT:
        return text
    return text[:HEAD] + GAP + text[HEAD + len(GAP) - LIMIT :]
