"""Options that do not fit together are refused with one message that names them."""

from __future__ import annotations

import pytest

from ham.errors import ConfigError
from ham.model.registry import parse_options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "unbounded"}, "budget: .*'threshold', 'bounded' or 'chunk_topk'"),
        ({"budget": "bounded"}, "'bounded' needs slots: no slots"),
        ({"budget": "bounded", "slots": 0}, "slots: .*(received 0)"),
        ({"slots": 8}, "slots 8 is an option of budget 'bounded', not of 'threshold'"),
        ({"budget": "chunk_topk", "chunk": 8}, "'chunk_topk' needs chunk and top_k: no top_k"),
        ({"budget": "chunk_topk", "top_k": 8}, "'chunk_topk' needs chunk and top_k: no chunk"),
        ({"budget": "chunk_topk", "chunk": 4, "top_k": 5}, r"top_k 5 .* legal: 1\.\.4 \(chunk\)"),
        ({"budget": "bounded", "slots": 8, "chunk": 4}, "chunk 4 is an option of budget 'chunk"),
        ({"budget": "bounded", "slots": 65}, "slots 65 is larger than the training context 64"),
        ({"budget": "chunk_topk", "chunk": 65, "top_k": 1}, "chunk 65 is larger than the training"),
        ({"window": 65}, "window 65 is larger than the training context 64; legal: at most 64"),
        ({"window": -1}, "window: .*(received -1)"),
        ({"sink": "zeros"}, "sink: .*'none', 'zero' or 'learned'"),
    ],
    ids=str,
)
def test_a_wrong_combination_is_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_options("ham", options, context=64)
    assert str(caught.value).count("\n") <= 1


@pytest.mark.parametrize(
    ("options", "window"),
    [({}, 0), ({"self_visible": True}, 1), ({"window": 5}, 5), ({"window": 5, "sink": "zero"}, 5)],
    ids=str,
)
def test_self_visible_is_a_window_of_one(options, window) -> None:
    assert parse_options("ham", options, context=64).visible_window == window
    assert parse_options("ham", {**options, "self_visible": True}, 64).visible_window == max(
        window, 1
    )
