"""`ham generate`: continue texts with a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ham.model.generation import GenerationFacts
    from ham.model.language_model import LanguageModel
    from ham.train.tokenizer import Tokenizer


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham generate`."""
    parser = subparsers.add_parser("generate", help="continue texts, greedily or by sampling")
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder of the model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompt", action="append", help="text to continue, may be empty; may be repeated"
    )
    source.add_argument(
        "--prompts-file", type=Path, metavar="FILE", help="texts to continue, one a line (UTF-8)"
    )
    add("--tokens", type=int, default=128, help="new tokens per prompt (default: %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-k", type=int, help="sample from this many most likely tokens")
    add("--top-p", type=float, help="sample from the fewest tokens with this probability together")
    add("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    add("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    add("--prefill-chunk", type=int, metavar="N", help="read prompts in pieces of N tokens")
    add(
        "--cache-mib",
        type=int,
        metavar="N",
        help="most MiB for the cache of routed tokens, all layers and prompts of a batch together "
        "(default: what the device has)",
    )
    add(
        "--fused",
        action=argparse.BooleanOptionalAction,
        help="decode by fused kernels in a CUDA graph (default: on a GPU, where they can)",
    )
    add("--json", action="store_true", help="print one JSON object a line instead of text")
    add("--device", default="auto", help="auto, cpu or cuda")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print each prompt and its continuation; facts about the run go to standard error.

    One prompt is printed as its tokens come.
    """
    import sys

    from ham.device import gpu_lease, resolve_device
    from ham.errors import ConfigError
    from ham.model.checkpoint import load_model
    from ham.model.generation import GenerationFacts
    from ham.model.precision import precision_context
    from ham.train.tokenizer import load_tokenizer

    for name, value in (("--tokens", arguments.tokens), ("--batch-size", arguments.batch_size)):
        if value < 1:
            raise ConfigError(f"{name} {value}; legal: an integer >= 1")
    if arguments.cache_mib is not None and arguments.cache_mib < 1:
        raise ConfigError(f"--cache-mib {arguments.cache_mib}; legal: an integer >= 1")
    texts = arguments.prompt or read_prompts(arguments.prompts_file)
    facts = GenerationFacts()
    with gpu_lease(arguments.device):
        model = load_model(arguments.checkpoint, resolve_device(arguments.device))
        tokenizer = load_tokenizer(model.config.tokenizer, arguments.checkpoint)
        prompts = [tokenizer.encode(text) or [tokenizer.end_of_text] for text in texts]
        with precision_context(model.device):
            if len(texts) == 1 and not arguments.json:
                _print_stream(arguments, model, tokenizer, texts[0], prompts[0], facts)
            else:
                _print_all(arguments, model, tokenizer, texts, prompts, facts)
    print(f"{model.config.arm}: {describe(facts)}", file=sys.stderr)
    return 0


def read_prompts(path: Path) -> list[str]:
    """The lines of a file; an empty line is an empty prompt.

    Raises:
        MissingDataError: If there is no such file.
        CorruptFileError: If it is not UTF-8.
        ConfigError: If it is empty.
    """
    from ham.errors import ConfigError, CorruptFileError, MissingDataError

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(f"{path} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise MissingDataError(f"cannot read the prompts: {error}") from error
    if not text:
        raise ConfigError(f"{path} holds no prompts; legal: one prompt a line")
    return text.removesuffix("\n").split("\n")


def describe(facts: GenerationFacts) -> str:
    """One line of what a generation took."""
    rate = facts.new_tokens / facts.seconds
    parts = [
        f"{facts.new_tokens} tokens in {facts.seconds:.2f} s ({rate:.0f} tokens/s)",
        f"the first after {facts.first_token_seconds:.2f} s",
        f"by {facts.decoder}",
        f"decoding memory {facts.memory_bytes:,} bytes",
    ]
    kept = facts.kept_fraction_per_layer()
    if kept:
        shares = ", ".join(f"layer {layer} {share:.1%}" for layer, share in kept.items())
        parts.append(f"tokens kept: {shares}")
    return "; ".join(parts)


def _print_stream(
    arguments: argparse.Namespace,
    model: LanguageModel,
    tokenizer: Tokenizer,
    text: str,
    prompt: list[int],
    facts: GenerationFacts,
) -> None:
    from ham.model.generation import stream
    from ham.train.text_stream import TextStream

    pieces = TextStream(tokenizer)
    tokens = stream(
        model,
        prompt,
        arguments.tokens,
        stop=lambda made: made[-1] == tokenizer.end_of_text,
        facts=facts,
        **_rules(arguments),
    )
    print(text, end="", flush=True)
    for token in tokens:
        print(pieces.push(token), end="", flush=True)
    print(pieces.finish())


def _print_all(
    arguments: argparse.Namespace,
    model: LanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    prompts: list[list[int]],
    facts: GenerationFacts,
) -> None:
    import json

    from ham.model.generation import generate
    from ham.progress import ProgressReporter

    with ProgressReporter("prompts", len(prompts)) as progress:
        answers = generate(
            model,
            prompts,
            arguments.tokens,
            stop=lambda made: made[-1] == tokenizer.end_of_text,
            batch_size=arguments.batch_size,
            facts=facts,
            on_finished=lambda ended, _: progress.advance(ended - progress.done),
            **_rules(arguments),
        )
    for number, (text, tokens) in enumerate(zip(texts, answers, strict=True)):
        ended = tokens[-1] == tokenizer.end_of_text
        continuation = tokenizer.decode(tokens)
        if arguments.json:
            record = {
                "prompt": text,
                "continuation": continuation,
                "tokens": len(tokens),
                "ended_by": "end_of_text" if ended else "length",
            }
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(text + continuation, end="\n" if number == len(texts) - 1 else "\n\n")


def _rules(arguments: argparse.Namespace) -> dict[str, int | float | bool | None]:
    names = ("temperature", "top_k", "top_p", "seed", "prefill_chunk", "fused")
    limit = arguments.cache_mib
    cache_bytes = None if limit is None else limit * 2**20
    return {"cache_bytes": cache_bytes, **{name: getattr(arguments, name) for name in names}}
