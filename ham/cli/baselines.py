"""`ham baselines`: the registered architectures."""

from __future__ import annotations

import argparse


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham baselines`."""
    parser = subparsers.add_parser("baselines", help="list the registered architectures")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    listing = actions.add_parser("list", help="one line each: name, title, paper, options")
    listing.set_defaults(handler=run_list)


def run_list(arguments: argparse.Namespace) -> int:
    """Print one line per registered mixer."""
    from ham.model.registry import registered_mixers

    mixers = registered_mixers()
    width = max(len(name) for name in mixers)
    for name, mixer in mixers.items():
        options = ", ".join(
            f"{option}={field.default}" for option, field in mixer.Options.model_fields.items()
        )
        print(f"{name:<{width}}  {mixer.title} ({mixer.paper}); options: {options or 'none'}")
    return 0
