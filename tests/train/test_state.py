"""The file that a resumed run starts from."""

from __future__ import annotations

import pytest
import torch

from ham.errors import CorruptFileError
from ham.train.state import load_state, random_state, restore_random_state, save_state

CPU = torch.device("cpu")


def test_state_round_trip(tmp_path) -> None:
    state = {"model": {"w": torch.randn(3)}, "step": 7, "log": [{"metric": "x", "value": 0.1}]}
    save_state(tmp_path / "state.pt", state)
    loaded = load_state(tmp_path / "state.pt", CPU)
    assert torch.equal(loaded["model"]["w"], state["model"]["w"])
    assert loaded["step"] == 7
    assert loaded["log"] == state["log"]


def test_no_state_is_none(tmp_path) -> None:
    assert load_state(tmp_path / "state.pt", CPU) is None


@pytest.mark.parametrize("damage", ["empty", "head", "truncated", "flipped"])
def test_damaged_states_are_refused(tmp_path, damage) -> None:
    path = tmp_path / "state.pt"
    save_state(path, {"w": torch.zeros(100)})
    content = bytearray(path.read_bytes())
    if damage == "empty":
        content = bytearray()
    elif damage == "head":
        content = content[:10]
    elif damage == "truncated":
        content = content[:-20]
    else:
        content[-20] ^= 255
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"state\.pt is truncated or changed"):
        load_state(path, CPU)


def test_random_state_continues_the_sequence() -> None:
    torch.manual_seed(0)
    torch.randn(5)
    state = random_state()
    expected = torch.randn(4)
    torch.manual_seed(99)
    restore_random_state(state)
    assert torch.equal(torch.randn(4), expected)
