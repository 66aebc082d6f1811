"""`ham inspect`: which tokens of a text each layer keeps, and whether decoding keeps the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from ham.inspect.agreement import Agreement
    from ham.model.decoder import DecoderLM
    from ham.report.rows import RowWriter

MAX_TOKENS = 4096


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham inspect`."""
    parser = subparsers.add_parser("inspect", help="which tokens of a text a trained model keeps")
    parser.add_argument("checkpoint", type=Path, help="folder of the model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read")
    source.add_argument(
        "--sample",
        type=Path,
        metavar="TOKENS",
        help="a shard, e.g. DATA/test.tokens: read a stretch of it and a needle document",
    )
    parser.add_argument(
        "--config",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="with --arm: the configuration of an arm that reads this checkpoint with eviction; "
        "what is still held at the end of the text counts as kept",
    )
    parser.add_argument("--arm", metavar="NAME", help="with --config: the arm")
    parser.add_argument("--out", type=Path, metavar="PAGE", help="HTML page to write")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="JSON-lines file to write")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--layer", type=int, nargs="+", metavar="N", help="layers to show (default: all that route)"
    )
    parser.add_argument(
        "--needle",
        nargs="+",
        default=[],
        metavar="STRING",
        help="strings of the text to count as needles; hidden sentences of needle documents always "
        "are",
    )
    parser.add_argument(
        "--top", type=int, default=5, metavar="N", help="tokens with the highest scores to print"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TOKENS,
        metavar="N",
        help="longer texts are cut (default: %(default)s); the model's max_positions cuts too",
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="arithmetic; auto: bfloat16 on a GPU, float32 elsewhere (default: %(default)s)",
    )
    parser.add_argument(
        "--agreement",
        action="store_true",
        help="also read the text in pieces and step by step, and count decisions and logits that "
        "differ from reading it at once",
    )
    parser.add_argument(
        "--pieces",
        type=int,
        metavar="N",
        help="with --agreement: tokens of a piece (default: 64)",
    )
    parser.add_argument(
        "--keep-going",
        action="store_true",
        help="if training left no model, write a page that says why and end with status 0",
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the shares by class and layer; write the page and the rows where asked for."""
    from ham.device import gpu_lease, resolve_device
    from ham.errors import ConfigError
    from ham.failure import read_failure
    from ham.files import write_text
    from ham.inspect.agreement_table import add_agreement_rows
    from ham.inspect.evictions import SCORE_NOTE, evicting_layers, trace_evictions
    from ham.inspect.page import render_failure, render_inspection
    from ham.inspect.sample import sample_text
    from ham.inspect.shares import add_rows, table_lines, top_lines
    from ham.inspect.text import read_text, tokenise
    from ham.inspect.trace import choose_layers, routing_layers, trace_layers
    from ham.train.tokenizer import load_tokenizer

    _check_counts(arguments)
    failure = read_failure(arguments.checkpoint)
    if failure and arguments.keep_going and arguments.out:
        arm = arguments.arm or str(arguments.checkpoint)
        write_text(arguments.out, render_failure(arm, failure))
        _forget_rows(arguments.rows)
        return 0
    with gpu_lease(arguments.device):
        model = _model(arguments, resolve_device(arguments.device))
        evicting = evicting_layers(model)
        if evicting and arguments.agreement:
            raise ConfigError(
                f"--agreement compares decisions by a threshold; arm {model.config.arm!r} evicts "
                "by a schedule"
            )
        layers = (
            choose_layers(evicting, arguments.layer)
            if evicting
            else routing_layers(model, arguments.layer)
        )
        tokenizer = load_tokenizer(model.config.tokenizer, arguments.checkpoint)
        limit = min(arguments.max_tokens, model.config.max_positions)
        if arguments.sample:
            text, of_what = sample_text(arguments.sample, tokenizer), ""
        else:
            text, of_what = read_text(arguments.text, limit)
        tokens = tokenise(text, tokenizer, limit, arguments.needle, of_what)
        read = trace_evictions if evicting else trace_layers
        traces = read(model, tokens.ids, layers, arguments.precision)
        source = _source(arguments, len(tokens.ids)) + (f"; {SCORE_NOTE}" if evicting else "")
        print(f"{model.config.arm}: {source}")
        if tokens.note:
            print(f"the text was {tokens.note}")
        print("\n".join(table_lines(tokens.classes_T, traces)))
        for trace in traces if arguments.top else []:
            print(f"\nhighest scores of layer {trace.layer}: score, kept, position, token, class")
            print("\n".join(top_lines(tokens, trace, arguments.top)))
        found = _agreement(model, tokens.ids, layers, arguments) if arguments.agreement else None
        if arguments.rows:
            writer, manifest = _writer(model, arguments)
            add_rows(writer, tokens.classes_T, traces)
            if found:
                add_agreement_rows(writer, found)
            _write_rows(writer, manifest, arguments.rows)
    if arguments.out:
        write_text(arguments.out, render_inspection(model.config.arm, source, tokens, traces))
        print(f"\n{arguments.out}")
    return 0


def _check_counts(arguments: argparse.Namespace) -> None:
    from ham.errors import ConfigError

    if arguments.top < 0:
        raise ConfigError(f"--top must be at least 0, received {arguments.top}")
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens must be at least 1, received {arguments.max_tokens}")
    if arguments.pieces is not None and not arguments.agreement:
        raise ConfigError(f"--pieces {arguments.pieces} goes with --agreement, which is not given")
    if (arguments.config is None) != (arguments.arm is None):
        raise ConfigError("--config and --arm go together, and only one of them is given")


def _model(arguments: argparse.Namespace, device: torch.device) -> DecoderLM:
    """The checkpoint, as an arm of a configuration reads it where one is named."""
    from ham.config_files import load_config
    from ham.model.arm import load_arm
    from ham.model.checkpoint import load_model

    if arguments.arm is None:
        return load_model(arguments.checkpoint, device)
    config = load_config(arguments.config)
    arm = config.arm(arguments.arm)
    config.check_arm(arm)
    return load_arm(config, arm, arguments.checkpoint, device)


def _agreement(
    model: DecoderLM, ids: Sequence[int], layers: Sequence[int], arguments: argparse.Namespace
) -> Agreement:
    """Compare the ways to read the text and print the table."""
    from ham.inspect.agreement import PIECE_TOKENS, agreement
    from ham.inspect.agreement_table import agreement_lines

    pieces = PIECE_TOKENS if arguments.pieces is None else arguments.pieces
    found = agreement(model, ids, layers, pieces=pieces, precision=arguments.precision)
    print()
    print("\n".join(agreement_lines(found)))
    return found


def _source(arguments: argparse.Namespace, count: int) -> str:
    if arguments.sample:
        return f"{count:,} tokens of held-out text and of a needle document"
    return f"{count:,} tokens of {arguments.text.name}"


def _writer(model: DecoderLM, arguments: argparse.Namespace) -> tuple[RowWriter, dict]:
    """A row writer for this model, and the manifest that its rows name."""
    import sys

    from ham.files import stable_hash
    from ham.job import used_providers
    from ham.model.checkpoint import read_description
    from ham.report.manifest import collect_manifest, device_name
    from ham.report.rows import RowWriter
    from ham.workflow import stage_fingerprint

    seed = read_description(arguments.checkpoint).get("facts", {}).get("seed")
    seeds = [] if seed is None else [seed]
    manifest = collect_manifest({"device": model.device.type}, sys.argv, seeds)
    writer = RowWriter(
        model=model.config.arm,
        mixer=model.config.mixer,
        parameters=model.count_parameters(),
        seed=seed,
        device=device_name(model.device.type, manifest["gpus"]),
        provider=used_providers(model),
        config_hash=stable_hash(model.config.to_dict()),
        code_fingerprint=stage_fingerprint("inspect", model.config.mixer),
        manifest_id=manifest["manifest_id"],
    )
    return writer, manifest


def _forget_rows(path: Path | None) -> None:
    """Rows of an earlier attempt say nothing about an arm that failed now."""
    from ham.report.manifest import manifest_path

    for stale in () if path is None else (path, manifest_path(path)):
        stale.unlink(missing_ok=True)


def _write_rows(writer: RowWriter, manifest: dict, path: Path) -> None:
    """The manifest first: a rows file never stands without it."""
    from ham.report.manifest import manifest_path, write_manifest

    write_manifest(manifest_path(path), manifest)
    writer.write(path)
