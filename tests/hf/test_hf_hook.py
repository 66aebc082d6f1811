"""Registration with the auto classes: both orders of import, threads, repetition."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("transformers", minversion="5.24")

import transformers

from ham.hf import HamConfig, HamForCausalLM, hook

HAM_FIRST = """
import sys, threading
import ham
heavy = {"transformers", "torch", "lm_eval", "datasets", "matplotlib", "triton"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
# In one thread: transformers replaces itself in sys.modules, and threads may see what was before.
import transformers
assert "ham.hf.modeling" not in sys.modules
found, wait = [], threading.Barrier(4)
def look():
    wait.wait()
    classes = transformers.AutoConfig, transformers.AutoModelForCausalLM, transformers.AutoTokenizer
    found.append(transformers.CONFIG_MAPPING["ham-bench"])
    found.append(transformers.MODEL_FOR_CAUSAL_LM_MAPPING[found[-1]])
threads = [threading.Thread(target=look) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
from ham.hf import HamConfig, HamForCausalLM
assert set(found) == {HamConfig, HamForCausalLM} and len(found) == 8, found
"""

TRANSFORMERS_FIRST = """
import sys
from transformers import AutoConfig, CONFIG_MAPPING
assert "ham-bench" not in CONFIG_MAPPING
import ham, importlib
for _ in range(2):
    importlib.reload(ham)
assert sum(type(finder).__name__ == "AutoClassFinder" for finder in sys.meta_path) == 1
assert AutoConfig.for_model("ham-bench").model_type == "ham-bench"
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_importing_ham_first_costs_nothing_and_registers_later() -> None:
    run(HAM_FIRST)


def test_importing_transformers_first_registers_at_once() -> None:
    run(TRANSFORMERS_FIRST)


def test_every_auto_class_that_is_there_already_is_told(monkeypatch) -> None:
    mappings = transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.TOKENIZER_MAPPING
    for mapping in mappings:
        monkeypatch.setattr(mapping, "_extra_content", {})
        assert HamConfig not in mapping
    hook.install()
    assert mappings[0][HamConfig] is HamForCausalLM
    assert mappings[1][HamConfig] is transformers.PreTrainedTokenizerFast


def test_other_modules_are_none_of_its_business() -> None:
    finder = hook.AutoClassFinder()
    assert finder.find_spec("json") is None
    assert finder.find_spec("transformers.models.auto") is None
    name = "transformers.models.auto.modeling_auto"
    import transformers.models.auto as package

    spec = finder.find_spec(name, package.__path__)
    assert spec.name == name and type(spec.loader).__name__ == "SourceFileLoader"


def test_a_transformers_that_will_not_do_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(hook, "transformers_fault", lambda: "transformers 4.0 is installed")
    module = sys.modules["transformers.models.auto.modeling_auto"]
    with pytest.warns(UserWarning, match=r"not registered: transformers 4\.0 is installed"):
        hook._register(module)
