"""Documents of a data set of the Hugging Face hub, or of a local folder, read as a stream.

Nothing is downloaded ahead: `datasets` streams the files in order until every split has its tokens.
A document's split follows from a hash of its text, so the splits hold disjoint documents, exact
duplicates never end up on two sides, and a second run gives the same splits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from ham.config import HubDataConfig
from ham.errors import ConfigError, MissingDataError

# Held-out splits fill a little earlier than the training split, so that the last of them does not
# keep a stream of billions of tokens running.
_HELD_OUT_MARGIN = 1.1


def stream_texts(hub: HubDataConfig) -> Iterator[str]:
    """The non-empty texts of a data set, in its own order.

    Raises:
        ConfigError: If the data set has no such subset, split or text field.
        MissingDataError: If the data set does not exist or the hub cannot be reached.
    """
    examples = _open(hub)
    while True:
        try:
            example = next(examples)
        except StopIteration:
            return
        except Exception as error:  # any network, parser or file system fault of the library
            raise _missing(hub, error) from error
        if not isinstance(example.get(hub.text_field), str):
            fields = ", ".join(sorted(name for name, value in example.items() if value is not None))
            raise ConfigError(
                f"data.hub.text_field {hub.text_field!r} is no text of {hub.dataset!r}; "
                f"known: {fields}"
            )
        if example[hub.text_field].strip():
            yield example[hub.text_field]


def split_of_text(text: str, hub: HubDataConfig) -> str:
    """The split of a document: a function of its text and of the sizes asked for."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64
    total = hub.train_tokens + 3 * hub.held_out_tokens
    share = min(_HELD_OUT_MARGIN * hub.held_out_tokens / total, 0.25)
    for number, split in enumerate(("calibration", "validation", "test"), start=1):
        if place < number * share:
            return split
    return "train"


def training_sample(hub: HubDataConfig, max_bytes: int) -> Iterator[str]:
    """The first training documents of the stream, about `max_bytes` of text in all."""
    size = 0
    for text in stream_texts(hub):
        if split_of_text(text, hub) != "train":
            continue
        yield text
        size += len(text.encode("utf-8"))
        if size >= max_bytes:
            return


def _open(hub: HubDataConfig) -> Iterator[dict]:
    import datasets

    try:
        return iter(
            datasets.load_dataset(hub.dataset, name=hub.subset, split=hub.split, streaming=True)
        )
    except ValueError as error:
        raise ConfigError(
            f"data.hub does not fit data set {hub.dataset!r} (subset {hub.subset!r}, split "
            f"{hub.split!r}): {error}"
        ) from error
    except Exception as error:  # any network, parser or file system fault of the library
        raise _missing(hub, error) from error


def _missing(hub: HubDataConfig, error: Exception) -> MissingDataError:
    return MissingDataError(
        f"cannot read data set {hub.dataset!r}: {type(error).__name__}: {error}; check the name "
        "and the network, give a local folder as data.hub.dataset, or set data.source to "
        "public_domain"
    )
