"""Models of transformers as arms: the same answers as the library, real bytes, clear refusals."""

from __future__ import annotations

import json
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experiment import experiment, external_arm
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from ham.cli import main
from ham.config_files import parse_config
from ham.errors import ConfigError, CorruptFileError, MissingDataError, UnusableModelError
from ham.evaluate.lm_eval_chance import untrained_twin
from ham.evaluate.word_classes import Spelling
from ham.external.configuration import check_external
from ham.external.memory import ExternalState, cache_bytes
from ham.failure import write_failure
from ham.fingerprint import reachable_modules, repository_root
from ham.model.arm import load_arm
from ham.model.checkpoint import load_model, save_model
from ham.model.generation import generate
from ham.model.sizing import model_config, parameter_count
from ham.plan import Plan, format_plan
from ham.report.rows import read_rows
from ham.train.retokenise import retokenise
from ham.train.shards import TokenShard
from ham.train.tokenizer import ByteTokenizer, VocabularyTokenizer, load_tokenizer, train_bpe
from ham.workflow import checkpoint_folder, rows_files, stage_modules

MODELS = {
    "llama": {},
    "gpt_neox": {},
    "mistral": {"sliding_window": 16},
    "mamba": {},
}
FLOAT = 4


@pytest.mark.parametrize("model_type", MODELS)
@torch.inference_mode()
def test_at_once_in_pieces_and_by_steps(build, model_type: str) -> None:
    model = build(model_type, **MODELS[model_type])
    tokens_BT = torch.randint(0, 257, (2, 40), generator=torch.Generator().manual_seed(1))
    whole_BTV = model(tokens_BT).logits_BTV
    expected_BTV = model.network(input_ids=tokens_BT).logits
    torch.testing.assert_close(whole_BTV, expected_BTV, rtol=0, atol=0)
    state = model.init_state(2)
    parts = [model.prefill(part, state).logits_BTV for part in tokens_BT[:, :33].split(11, dim=1)]
    parts += [model.step(tokens_B, state)[:, None] for tokens_B in tokens_BT[:, 33:].unbind(dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole_BTV, rtol=1e-4, atol=1e-5)
    assert state.position == 40
    last = model.prefill(tokens_BT, model.init_state(2), last_only=True).logits_BTV
    torch.testing.assert_close(last, whole_BTV[:, -1:], rtol=1e-4, atol=1e-5)


def test_bytes_are_those_of_the_real_cache(build) -> None:
    layers, width, length = 2, 32, 40

    @torch.inference_mode()
    def held(model_type: str, **config) -> dict[str, int]:
        model = build(model_type, **config)
        state = model.init_state(1)
        model.prefill(torch.zeros(1, length, dtype=torch.int64), state)
        assert (model.held_share(length) == 1.0) == (model_type == "llama" and not config)
        return state.bytes_allocated()

    kept = 2 * layers * width * FLOAT
    assert held("llama") == {"kv": length * kept}
    # A window of 16 has the current token and 15 older ones; the buffer behind it stays for a step.
    window = held("mistral", sliding_window=16)
    assert window["kv"] == 15 * kept and window["unused"] == (length - 15) * kept
    # Mamba: inner width 2 W, convolution of 4, state of 16 (arXiv 2312.00752, section 3.4).
    assert held("mamba") == {
        "conv": layers * 2 * width * 4 * FLOAT,
        "recurrent": layers * 2 * width * 16 * FLOAT,
    }


def test_a_cache_is_walked_through_whatever_it_is_made_of() -> None:
    buffer = torch.zeros(10, 8)

    class Layer:
        def __init__(self):
            self.state = {"attn_state": (buffer[:4], None), "conv_state": [torch.zeros(3)]}
            self.seen = torch.zeros(2, dtype=torch.int64)
            self.itself, self.again, self.name = self, self.state, "layer"

    assert cache_bytes([Layer(), {"ssm": torch.zeros(5, dtype=torch.bfloat16)}]) == {
        "kv": 4 * 8 * 4,
        "conv": 12,
        "positions": 16,
        "recurrent": 10,
        "unused": 6 * 8 * 4,
    }
    assert cache_bytes(None) == {}


@pytest.mark.parametrize("model_type", ["llama", "mamba"])
def test_prompts_of_any_length_decode_in_one_batch(build, model_type: str) -> None:
    model = build(model_type)
    prompts = [[5, 9, 2], [7] * 9, [1, 2, 3], [250, 0], [8, 8, 9]]

    def stop(made: list[int]) -> bool:
        return made[-1] % 5 == 0

    together = generate(model, prompts, 12, stop, batch_size=4)
    assert together == [generate(model, [prompt], 12, stop)[0] for prompt in prompts]
    assert len({len(made) for made in together}) > 1
    with pytest.raises(ConfigError, match="another library"):
        generate(model, prompts, 2, fused=True)


def test_the_untrained_twin_starts_where_training_did(build) -> None:
    model = build("llama")
    started = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    twin = untrained_twin(model, seed=0)
    assert not twin.training and all(
        torch.equal(tensor, started[name]) for name, tensor in twin.state_dict().items()
    )


@torch.inference_mode()
def test_joined_memories_stay_as_they_are(build) -> None:
    model = build("llama")
    tokens_BT = torch.arange(20).reshape(2, 10)
    one, other = model.init_state(2), model.init_state(1)
    model.prefill(tokens_BT, one)
    model.prefill(tokens_BT[:1, :4], other)
    both = ExternalState.join([one, other])
    assert both.positions.lengths == [10, 10, 4]
    both.select(torch.tensor([2, 1]))
    logits_BV = model.step(torch.tensor([3, 3]), both)
    torch.testing.assert_close(logits_BV[1], model.step(torch.tensor([3, 3]), one)[1])
    torch.testing.assert_close(logits_BV[0], model.step(torch.tensor([3]), other)[0])
    with pytest.raises(ValueError, match="not different"):
        both.select(torch.tensor([0, 0]))


def test_sizes_come_from_the_experiment_and_parameters_match() -> None:
    config = experiment(external_arm("gpt_neox", hidden_dropout=0.1))
    target = parameter_count(model_config(config, config.arms[0], 257))
    found = model_config(config, config.arms[1], 257)
    assert found.matched and abs(parameter_count(found) - target) <= 0.01 * target
    network = found.build().network
    assert parameter_count(found) == sum(one.numel() for one in network.parameters())
    own = network.config
    assert (own.hidden_size, own.num_hidden_layers, own.num_attention_heads) == (32, 2, 2)
    assert (own.max_position_embeddings, own.vocab_size, own.hidden_dropout) == (1024, 257, 0.1)
    # Overrides win, under either name; what depends on them follows.
    config = experiment(external_arm("gpt2", n_embd=64, num_hidden_layers=1))
    found = model_config(config, config.arms[1], 257)
    assert (found.values["n_embd"], found.values["n_layer"]) == (64, 1) and not found.matched
    config = experiment(external_arm("qwen3", num_attention_heads=4))
    values = model_config(config, config.arms[1], 257).values
    assert (values["num_key_value_heads"], values["head_dim"]) == (4, 8)


def test_flops_are_counted_or_said_to_be_approximate(build, monkeypatch) -> None:
    model = build("llama", intermediate_size=64)
    layer = 4 * 32 * 32 + 3 * 32 * 64
    # The counter sees both halves of the attention matrix.
    attention = 2 * 2 * 2 * 24 * 24 * 32
    assert model.forward_flops(24) == 2 * 24 * (2 * layer + 32 * 257) + attention
    assert model.flops_source == "torch's flop counter"
    monkeypatch.setattr(model, "_traced", lambda *_: 1 / 0)
    assert model.flops_source == "6N approximation"
    assert model.forward_flops(8) == 2 * model.count_parameters() * 8


def run_stages(path: str, data: Path, folder: Path, checkpoint: bool = True) -> dict[str, list]:
    """Rows of `ham train`, `ham evaluate` and `ham measure` for the arm `other`."""
    common = [path, "--arm", "other", "--seed", "0", "--data", str(data), "--keep-going"]
    where = ["--checkpoint", str(folder / "checkpoint")] if checkpoint else []
    if checkpoint:
        state = ["--state", str(folder / "state")]
        assert main(["train", *common, "--out", str(folder), *state]) == 0
    for stage in ("evaluate", "measure"):
        rows = folder / f"{stage}.rows.jsonl"
        assert main([stage, *common, *where, "--rows", str(rows)]) == 0
    return {file.name.split(".")[0]: read_rows(file) for file in folder.glob("*.rows.jsonl")}


def test_an_arm_by_configuration_alone(data: Path, tmp_path: Path, write_config) -> None:
    rows = run_stages(write_config(experiment(external_arm("llama"))), data, tmp_path)
    everything = [row for stage in rows.values() for row in stage]
    assert not [row.error for row in everything if row.error]
    assert {(row.mixer, row.provider) for row in everything} == {
        ("transformers:llama", "transformers")
    }
    (bits,) = [row for row in rows["evaluate"] if row.metric == "bits_per_byte"]
    assert bits.kv_fraction == 1.0 and 7 < bits.value < 9
    measured = {row.metric for row in rows["measure"]}
    assert {"prefill_ms", "decode_ms", "training_step_ms", "kv_bytes"} <= measured
    assert "declared_bytes" not in measured
    model, theirs = load_model(tmp_path / "checkpoint"), tmp_path / "checkpoint"
    network = AutoModelForCausalLM.from_pretrained(theirs, local_files_only=True)
    tokens_BT = torch.arange(8)[None]
    torch.testing.assert_close(model(tokens_BT).logits_BTV, network(tokens_BT).logits)
    description = json.loads((tmp_path / "checkpoint" / "model.json").read_text())
    assert description["facts"]["parameters_matched"] is True
    assert main(["export", str(theirs), str(tmp_path / "hf")]) == 2
    # What an attempt that failed leaves beside older weights is not taken for a foreign model.
    write_failure(theirs, "diverged")
    with pytest.raises(MissingDataError, match="holds no model: training failed: diverged"):
        load_model(theirs)


def test_a_library_that_is_missing_is_an_error_row(
    data: Path, tmp_path: Path, write_config, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "fla", None)
    monkeypatch.setitem(sys.modules, "fla.models", None)
    config = experiment(external_arm("gla", library="fla"))
    path = write_config(config)
    rows = run_stages(path, data, tmp_path)
    for row in [*rows["train"], *rows["evaluate"], *rows["measure"]]:
        assert row.value is None and "need flash-linear-attention (pip install" in row.error
        assert row.mixer == "fla:gla"
    assert {"bits_per_byte", "accuracy"} <= {row.metric for row in rows["evaluate"]}
    assert {"prefill_ms", "training_step_ms"} <= {row.metric for row in rows["measure"]}
    assert "arm 'other' failed: models of library 'fla' need" in capsys.readouterr().err
    assert "need flash-linear-attention" in format_plan(Plan(config, cores=2))
    # Another machine may have it, so the configuration is valid.
    assert main(["config", "check", path]) == 0
    assert "arm 'other' cannot run here: models of library 'fla'" in capsys.readouterr().err
    # A command that is run alone ends with the message.
    common = ["--arm", "other", "--seed", "0", "--data", str(data)]
    assert main(["train", path, *common, "--out", str(tmp_path / "alone")]) == 2
    message = capsys.readouterr().err
    assert "need flash-linear-attention" in message and message.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("model_type", ["gla", "delta_net", "gated_deltanet"])
def test_flash_linear_attention(data: Path, tmp_path: Path, write_config, model_type: str) -> None:
    pytest.importorskip("fla.models", reason="needs flash-linear-attention")
    model = {"layers": 2, "width": 128, "heads": 2, "max_positions": 1024}
    config = experiment(external_arm(model_type, library="fla"), model=model)
    rows = run_stages(write_config(config), data, tmp_path)
    assert not [row.error for stage in rows.values() for row in stage if row.error]
    held = [row.value for row in rows["measure"] if row.metric == "recurrent_bytes"]
    assert held and len(set(held)) == 1


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    """A Hugging Face folder of a GPT-NeoX with a byte-level BPE of its own."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("foreign") / "pythia"
    tokenizer = train_bpe(texts, 300)
    config = experiment(external_arm("gpt_neox", max_position_embeddings=64))
    network = model_config(config, config.arms[1], tokenizer.vocabulary_size).build().network
    network.save_pretrained(folder)
    library = Library.from_str(tokenizer.definition)
    PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|endoftext|>").save_pretrained(
        folder
    )
    return folder


def checkpoint_arm(folder: Path) -> dict[str, str]:
    return {"name": "other", "checkpoint": str(folder)}


def test_a_checkpoint_is_evaluated_in_its_own_tokens(
    foreign: Path, data: Path, tmp_path: Path, write_config, texts, capsys
) -> None:
    evaluate = {
        "language_modelling": {"tokens": 100_000, "contexts": [32], "position_bins": 1},
        "needle": {"tasks": ["niah_single_1"], "depths": [0.5], "samples": 1},
        "lm_eval": None,
    }
    config = experiment(checkpoint_arm(foreign), evaluate=evaluate)
    path = write_config(config)
    rows = run_stages(path, data, tmp_path, checkpoint=False)
    (bits,) = [row for row in rows["evaluate"] if row.metric == "bits_per_byte"]
    # By hand: the library's own loss over every window of 32 targets.
    network = AutoModelForCausalLM.from_pretrained(foreign, local_files_only=True)
    library = Library.from_file(str(foreign / "tokenizer.json"))
    nats, size = 0.0, 0
    for text in texts:
        ids = library.encode(text).ids
        for start in range(0, len(ids) - 32, 32):
            window = torch.tensor([ids[start : start + 33]])
            nats += 32 * network(window, labels=window).loss.item()
            size += len(library.decode(window[0, 1:].tolist()).encode())
    assert bits.value == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert bits.mixer == "transformers:gpt_neox"
    assert not [row for row in rows["evaluate"] if row.metric.startswith("unigram")]
    # 512 tokens are beyond its 64 positions: those cells fail, the others stand.
    failed = {row.experiment for row in rows["evaluate"] if row.error}
    assert "needle" in failed and "language_modelling" not in failed
    assert not [row.error for row in rows["measure"] if row.error]
    train = ["train", path, "--arm", "other", "--seed", "0", "--data", str(data)]
    assert main([*train, "--out", str(tmp_path / "out")]) == 2
    assert "arm 'other' is not trained: it reads the checkpoint" in capsys.readouterr().err
    text = format_plan(Plan(config, cores=2))
    assert "transformers:gpt_neox" in text and "FLOPs by torch's flop counter" in text
    assert main(["generate", str(foreign), "--prompt", "the", "--tokens", "3"]) == 0
    sample = ["--sample", str(data / "test.tokens")]
    assert main(["inspect", str(foreign), *sample]) == 2
    assert "routes no tokens" in capsys.readouterr().err


def test_an_exported_ham_is_such_a_checkpoint(tiny_model, data: Path, tmp_path: Path) -> None:
    model = tiny_model("ham", target=0.5)
    save_model(tmp_path / "checkpoint", model)
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "hf")]) == 0
    config = experiment(checkpoint_arm(tmp_path / "hf"))
    loaded = load_arm(config, config.arms[1], tmp_path / "hf", torch.device("cpu"))
    tokens_BT = torch.arange(30)[None]
    torch.testing.assert_close(loaded(tokens_BT).logits_BTV, model(tokens_BT).logits_BTV)
    assert loaded.routes and loaded.config.arm == "other"


def copied(foreign: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in foreign.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def only_pickles(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(tensors))


def without_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("gpt_neox.final_layer_norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


CHECKPOINT_FAULTS = {
    "pickles": (only_pickles, ConfigError, r"weights in pytorch_model\.bin only: pickles"),
    "a key to pickles": (
        lambda folder: edit_config(folder, transformers_weights="pytorch_model.bin"),
        ConfigError,
        "sets transformers_weights",
    ),
    "unknown type": (
        lambda folder: edit_config(folder, model_type="lama"),
        (ConfigError, UnusableModelError),
        "unknown model_type of a checkpoint 'lama'; nearest of .* known: .*llama",
    ),
    "no type": (
        lambda folder: (folder / "config.json").write_text("{}"),
        CorruptFileError,
        "names no model_type",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        MissingDataError,
        r"tokenizer\.json does not exist; `AutoTokenizer",
    ),
    "a weight missing": (
        without_a_weight,
        CorruptFileError,
        r"do not fit its config\.json: gpt_neox\.final_layer_norm\.weight is missing",
    ),
    "other sizes": (
        lambda folder: edit_config(folder, intermediate_size=80),
        CorruptFileError,
        "the weights in .*copy",
    ),
    "another size altogether": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
        CorruptFileError,
        r"describes 6,738,415,616 parameters: the files hold",
    ),
    "truncated": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 100),
        CorruptFileError,
        "is not a complete safetensors file",
    ),
}


@pytest.mark.parametrize("fault", CHECKPOINT_FAULTS)
def test_a_faulty_checkpoint_has_one_message(foreign: Path, tmp_path: Path, fault: str) -> None:
    folder = copied(foreign, tmp_path)
    change, error, message = CHECKPOINT_FAULTS[fault]
    change(folder)
    with pytest.raises(error, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        (external_arm("lama"), "unknown model_type of library 'transformers' 'lama'.*llama"),
        (
            external_arm("llama", hiden_size=3),
            "unknown key of a 'llama' configuration.*hidden_size",
        ),
        (external_arm("llama", hidden_size="wide"), "a 'llama' configuration refuses"),
        (external_arm("llama", num_attention_heads=3, num_key_value_heads=3), "'llama'"),
    ],
)
def test_bad_values_are_refused(arm: dict, message: str) -> None:
    config = experiment(arm)
    with pytest.raises(ConfigError, match=message):
        check_external(config.arms[1])
        model_config(config, config.arms[1], 257).build()


def test_an_arm_is_of_one_kind() -> None:
    for arm, message in (
        ({"name": "a"}, "give one of mixer, external, checkpoint; received none"),
        ({"name": "a", "mixer": "ham", "checkpoint": "x"}, "received mixer and checkpoint"),
        ({"name": "a", "checkpoint": "x", "options": {"b": 1}}, "go with a mixer, not with check"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_config({"name": "x", "arms": [arm]})


def test_models_that_cannot_be_judged_say_so(build, monkeypatch) -> None:
    with pytest.raises(
        UnusableModelError, match=r"'other' .transformers:bert. is not causal: token"
    ):
        build("bert").check_runs()
    model = build("llama")
    with pytest.raises(UnusableModelError, match=r"of 1025 tokens is longer than .* 1024"):
        model(torch.zeros(1, 1025, dtype=torch.int64))
    whole = model.network.forward
    monkeypatch.setattr(model.network, "forward", lambda **given: whole(**{**given, "cache": None}))
    with pytest.raises(UnusableModelError, match="steps from its cache give logits that differ"):
        model.init_state(1)
    monkeypatch.setattr(
        model.network, "forward", lambda **given: whole(**{**given, "use_cache": False})
    )
    with pytest.raises(UnusableModelError, match=r"no tensor is found in its cache .NoneType."):
        model.init_state(1)
    model._cache_name = None
    with pytest.raises(UnusableModelError, match="takes none of cache, past_key_values"):
        model.init_state(1)


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


def test_the_workflow_knows_what_is_trained() -> None:
    values = {**experiment(checkpoint_arm(Path("p"))).model_dump(), "seeds": [0, 1]}
    config = parse_config(values)
    rows = [row for row in rows_files(config) if "/other/" in row]
    assert [row.rpartition("models/")[2] for row in rows] == [
        "other/seed0/evaluate.rows.jsonl",
        "other/seed0/measure.rows.jsonl",
    ]
    assert checkpoint_folder(config, "other", 0) == "p"
    assert checkpoint_folder(config, "own", 1).endswith("own/seed1/checkpoint")


def test_code_of_external_models_counts_for_them_alone() -> None:
    own, other = experiment(external_arm("llama")).arms
    for stage in ("train", "evaluate", "measure"):
        modules = {
            arm.name: reachable_modules(stage_modules(stage, arm.code), repository_root())
            for arm in (own, other)
        }
        assert "ham.external.model" in modules["other"]
        assert "ham.external.model" not in modules["own"]
