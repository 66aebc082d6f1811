"""`ham generate`: continue a text with a trained model."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham generate`."""
    parser = subparsers.add_parser("generate", help="continue a text greedily")
    parser.add_argument("checkpoint", type=Path, help="folder of the model")
    parser.add_argument("--prompt", required=True, help="text to continue; may be empty")
    parser.add_argument("--tokens", type=int, default=128, help="new tokens (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the prompt and its continuation; facts about the run go to standard error."""
    import sys
    import time

    from ham.device import gpu_lease, resolve_device
    from ham.errors import ConfigError
    from ham.model.checkpoint import load_model
    from ham.model.generation import generate
    from ham.model.precision import precision_context
    from ham.train.tokenizer import load_tokenizer

    with gpu_lease(arguments.device):
        model = load_model(arguments.checkpoint, resolve_device(arguments.device))
        tokenizer = load_tokenizer(model.config.tokenizer, arguments.checkpoint)
        prompt = tokenizer.encode(arguments.prompt) or [tokenizer.end_of_text]
        room = model.config.max_positions - len(prompt)
        if not 1 <= arguments.tokens <= room:
            raise ConfigError(
                f"--tokens {arguments.tokens}: after a prompt of {len(prompt)} tokens this model "
                f"can make 1..{room} more (max_positions {model.config.max_positions})"
            )
        begin = time.perf_counter()
        with precision_context(model.device):
            (tokens,) = generate(
                model,
                [prompt],
                arguments.tokens,
                stop=lambda made: made[-1] == tokenizer.end_of_text,
            )
        seconds = time.perf_counter() - begin
    print(arguments.prompt + tokenizer.decode(tokens))
    print(f"{model.config.arm}: {len(tokens)} tokens in {seconds:.2f} s", file=sys.stderr)
    return 0
