"""Batches: a pure function of seed and step that covers the text and mixes in recall rows."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch

from ham.errors import ConfigError
from ham.model.decoder import IGNORED
from ham.train.batches import BatchSampler
from ham.train.shards import ShardWriter, TokenShard
from ham.train.tokenizer import ByteTokenizer, train_bpe

CONTEXT = 32


def make_shard(path, documents: list[np.ndarray]) -> TokenShard:
    with ShardWriter(path, ByteTokenizer()) as writer:
        for tokens in documents:
            writer.add(tokens, len(tokens))
    return TokenShard.open(path)


@pytest.fixture
def shard(tmp_path) -> TokenShard:
    """5,003 tokens in which every three consecutive ones are unique."""
    stream = np.arange(5_000)
    letters = np.where(stream % 2, stream // 2 % 97, 97 + stream // 2 // 97)
    return make_shard(
        tmp_path / "train.tokens", [letters[:2_000], letters[2_000:2_001], letters[2_001:]]
    )


def sampler(shard, **changes) -> BatchSampler:
    settings = {"context": CONTEXT, "batch_size": 4, "recall_fraction": 0.0, "seed": 7, **changes}
    return BatchSampler(shard, ByteTokenizer(), **settings)


def equal(first, second) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_shapes_and_shift(shard) -> None:
    batch = sampler(shard, recall_fraction=0.5).batch(0)
    assert batch.inputs_BT.shape == batch.targets_BT.shape == (4, CONTEXT)
    assert batch.inputs_BT.dtype == batch.targets_BT.dtype == torch.int64
    assert batch.is_recall_B.shape == (4,) and batch.is_recall_B.dtype == torch.bool
    wanted_BT = batch.targets_BT[:, :-1] != IGNORED
    assert wanted_BT[~batch.is_recall_B].all() and wanted_BT[batch.is_recall_B].any()
    assert torch.equal(batch.inputs_BT[:, 1:][wanted_BT], batch.targets_BT[:, :-1][wanted_BT])


def test_a_batch_follows_from_seed_and_step_alone(shard) -> None:
    first, second = (sampler(shard, recall_fraction=0.3) for _ in range(2))
    for step in (5, 0, 400, 5):
        assert equal(first.batch(step), second.batch(step))
        assert equal(first.batch(step), first.batch(step))
    assert not equal(first.batch(5), first.batch(6))
    assert not equal(first.batch(5), sampler(shard, recall_fraction=0.3, seed=8).batch(5))


def test_rows_do_not_depend_on_how_they_are_batched(shard) -> None:
    small, large = (sampler(shard, batch_size=size, recall_fraction=0.3) for size in (2, 6))
    small_rows = torch.cat([small.batch(step).inputs_BT for step in range(3)])
    assert torch.equal(small_rows, large.batch(0).inputs_BT)


def starts(shard, batches) -> list[int]:
    """Where in the stream each text row begins."""
    stream = np.asarray(shard.tokens).astype(np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(stream, CONTEXT)
    places = {window.tobytes(): start for start, window in enumerate(windows)}
    return [places[row.numpy().tobytes()] for batch in batches for row in batch.inputs_BT]


def test_an_epoch_covers_the_text_once_from_a_new_phase(shard) -> None:
    made = sampler(shard, batch_size=1)
    assert made.windows == (5_003 - CONTEXT) // CONTEXT
    epochs = [
        starts(shard, [made.batch(epoch * made.windows + i) for i in range(made.windows)])
        for epoch in range(3)
    ]
    phases = set()
    for epoch in epochs:
        phases.add(min(epoch))
        assert sorted(epoch) == list(range(min(epoch), max(epoch) + 1, CONTEXT))
        assert len(epoch) == made.windows
        assert epoch != sorted(epoch)
    assert all(0 <= phase < CONTEXT for phase in phases)
    assert len(phases) > 1
    assert epochs[0] != epochs[1]


def test_every_phase_and_the_end_of_the_stream_are_reached(tmp_path) -> None:
    tokens = np.arange(200) % 251
    shard = make_shard(tmp_path / "short.tokens", [tokens])
    made = sampler(shard, batch_size=1)
    found = starts(shard, [made.batch(step) for step in range(made.windows * 300)])
    assert {start % CONTEXT for start in found} == set(range(CONTEXT))
    # The stream is 201 tokens: the last window of the last phase ends with its last target.
    assert max(found) + CONTEXT + 1 <= 201


def test_the_shortest_shard_that_holds_a_row(tmp_path) -> None:
    shard = make_shard(tmp_path / "one.tokens", [np.arange(CONTEXT)])
    batch = sampler(shard, batch_size=3).batch(2)
    assert batch.inputs_BT.tolist() == [list(range(CONTEXT))] * 3
    assert batch.targets_BT[:, -1].tolist() == [256] * 3
    with pytest.raises(ConfigError, match="a context of 33 tokens needs a shard of at least 34"):
        sampler(shard, context=33)


def test_the_share_of_recall_rows(shard) -> None:
    for fraction in (0.0, 0.1, 0.5, 1.0):
        made = sampler(shard, batch_size=50, recall_fraction=fraction)
        flags = torch.cat([made.batch(step).is_recall_B for step in range(40)]).float()
        tolerance = 4 * (fraction * (1 - fraction) / len(flags)) ** 0.5
        assert abs(float(flags.mean()) - fraction) <= tolerance


def test_recall_rows_do_not_move_text_rows(shard) -> None:
    plain = sampler(shard, batch_size=32).batch(3)
    mixed = sampler(shard, batch_size=32, recall_fraction=0.5).batch(3)
    text = ~mixed.is_recall_B
    assert 0 < int(text.sum()) < 32
    assert torch.equal(plain.inputs_BT[text], mixed.inputs_BT[text])


@pytest.fixture
def prose(tmp_path) -> TokenShard:
    text = np.frombuffer(b"Much prose. " * 200, dtype=np.uint8)
    return make_shard(tmp_path / "prose.tokens", [text])


HEADS = {
    "pairs": "\nPairs\n",
    "copies": "\nCopies\n",
    "needles": "A special magic number is hidden",
}
ANSWERED = r"number for (\S+) mentioned in the provided text is (\d{7})"


def test_every_kind_of_recall_document_appears(prose) -> None:
    made = sampler(prose, context=2048, batch_size=32, recall_fraction=1.0)
    rows = torch.cat([made.batch(step).inputs_BT for step in range(8)]).tolist()
    texts = [ByteTokenizer().decode(row) for row in rows]
    found = {
        kind: [text for text in texts if text.startswith(head)] for kind, head in HEADS.items()
    }
    assert sum(map(len, found.values())) == len(set(texts)) == 256
    for kind, share in (("pairs", 0.35), ("copies", 0.15), ("needles", 0.5)):
        assert abs(len(found[kind]) / 256 - share) < 4 * (share * (1 - share) / 256) ** 0.5
    documents = [text.split(HEADS["needles"])[1] for text in found["needles"]]
    samples = [text for text in documents if len(re.findall(ANSWERED, text)) == 1]
    assert 12 <= len(samples) <= 60
    sentence = "One of the special magic numbers for "
    kinds = [
        "noise"
        if "The grass is green." in sample
        else {4: "keys", 1: "prose"}.get(sample.count(sentence), "needles")
        for sample in samples
    ]
    assert {kind: kinds.count(kind) >= 2 for kind in kinds} == dict.fromkeys(
        ("noise", "needles", "keys", "prose"), True
    )
    # A sample ends before the row does, and pairs fill it.
    assert any("\nPairs\n" in text for text in found["needles"])


def test_answers_to_questions_for_needles_stand_in_the_context(prose) -> None:
    made = sampler(prose, context=1500, batch_size=32, recall_fraction=1.0)
    rows = torch.cat([made.batch(step).inputs_BT for step in range(4)]).tolist()
    answered, first = 0, 0
    for row in rows:
        for document in ByteTokenizer().decode(row).split(HEADS["needles"])[1:]:
            hidden = dict(re.findall(r"numbers for (\S+) is: (\d{7})\.", document))
            asked = re.findall(ANSWERED, document)
            assert all(hidden[key] == value for key, value in asked)
            answered += len(asked)
            first += len(dict(asked))
    # Half of the questions are the first for their needle.
    assert answered > 100 and first >= answered / 2


def test_only_answers_of_recall_rows_are_targets(prose) -> None:
    made = sampler(prose, context=1500, batch_size=64, recall_fraction=0.7)
    batch = made.batch(0)
    tokenizer = ByteTokenizer()
    kinds = set()
    for inputs, targets, is_recall in zip(*(part.tolist() for part in batch), strict=True):
        wanted = [index for index, target in enumerate(targets) if target != IGNORED]
        if not is_recall:
            assert len(wanted) == 1500
            continue
        assert [targets[index] for index in wanted[:-1]] == [inputs[i + 1] for i in wanted[:-1]]
        text, asked = tokenizer.decode(inputs), tokenizer.decode([targets[i] for i in wanted])
        if text.startswith(HEADS["needles"]) and HEADS["pairs"] not in text:
            kinds.add("needles")
            # The last answer may be cut, or not be among the inputs.
            answers = "".join(f" {value}" for _, value in re.findall(ANSWERED, text))
            assert asked.startswith(answers) and len(asked) - len(answers) <= 8
        elif text.startswith(HEADS["pairs"]):
            kinds.add("pairs")
            asked_lines = "".join(re.findall(r"Asked\n((?:\S\S\n)*)", text))
            values = "".join(re.findall(r"\S(\S)\n", asked_lines))
            assert asked.startswith(values) and len(asked) - len(values) <= 1
    assert kinds == {"needles", "pairs"}


def test_most_of_a_pairs_row_can_be_answered(shard) -> None:
    made = sampler(shard, context=384, batch_size=50, recall_fraction=1.0)
    repeated = 0
    for row in made.batch(0).inputs_BT.tolist():
        for document in ByteTokenizer().decode(row).split("\nPairs\n")[1:]:
            listed, _, asked = document.partition("Asked\n")
            values = dict(re.findall(r"(\S)(\S)\n", listed))
            questions = re.findall(r"(\S)(\S)\n", asked)
            assert all(values[key] == value for key, value in questions)
            repeated += len(questions) > len(values)
    assert repeated >= 50


def test_sizes_of_pairs_documents_get_equal_shares_of_tokens(shard) -> None:
    tokenizer = ByteTokenizer()
    made = sampler(shard, context=384, batch_size=50, recall_fraction=1.0)
    rows = [row for step in range(10) for row in made.batch(step).inputs_BT.tolist()]
    listed = re.compile(r"Pairs\n((?:\S\S\n)+)Asked")
    sizes = [len(found) // 3 for row in rows for found in listed.findall(tokenizer.decode(row))]
    assert min(sizes) == 2 and max(sizes) == 32
    lines = [
        sum(size for size in sizes if low <= size < high)
        for low, high in ((2, 4), (4, 8), (8, 16), (16, 33))
    ]
    assert max(lines) < 1.5 * min(lines)


def test_a_context_too_short_for_a_needle_has_no_needles(shard) -> None:
    made = sampler(shard, context=64, batch_size=32, recall_fraction=1.0)
    texts = [ByteTokenizer().decode(row) for row in made.batch(0).inputs_BT.tolist()]
    assert {text[:7] for text in texts} == {"\nPairs\n", "\nCopies"}


def test_every_recall_row_has_a_target(prose) -> None:
    # A third of rows this short used to end in the prose before the first needle.
    made = sampler(prose, context=512, batch_size=50, recall_fraction=1.0)
    batch = made.batch(0)
    assert batch.is_recall_B.all()
    assert (batch.targets_BT != IGNORED).any(dim=1).all()
    with pytest.raises(ConfigError, match="2 tokens had no answer"):
        sampler(prose, context=2, batch_size=1, recall_fraction=1.0).batch(0)


def test_another_tokenizer_is_refused(shard) -> None:
    bpe = train_bpe(["some text"], 260)
    with pytest.raises(ConfigError, match="made with tokenizer 'byte', not 'bpe-4096'"):
        BatchSampler(shard, bpe, CONTEXT, 4, 0.1, 0)


def test_batches_are_quick(shard) -> None:
    made = sampler(shard, context=512, batch_size=8, recall_fraction=0.1)
    made.batch(0)
    seconds = []
    for step in range(1, 30):
        begin = time.perf_counter()
        made.batch(step)
        seconds.append(time.perf_counter() - begin)
    assert np.median(seconds) < 3e-3
