"""`ham config`: the JSON schema, the resolved configuration, or a check of one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the `config` command."""
    parser = subparsers.add_parser("config", help="print the schema, resolve or check a file")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    schema = actions.add_parser("schema", help="print the JSON schema of a configuration file")
    schema.set_defaults(handler=_schema)
    show = actions.add_parser("show", help="print the resolved configuration as YAML")
    check = actions.add_parser("check", help="validate, mixer options and task names included")
    for action, handler in ((show, _show), (check, _check)):
        action.add_argument(
            "config", type=Path, nargs="+", metavar="CONFIG", help="a later file overlays"
        )
        action.add_argument(
            "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE"
        )
        action.set_defaults(handler=handler)


def _schema(arguments: argparse.Namespace) -> int:
    from ham.config_files import json_schema

    print(json.dumps(json_schema(), indent=2))
    return 0


def _show(arguments: argparse.Namespace) -> int:
    import yaml

    from ham.config_files import load_config

    config = load_config(arguments.config, arguments.overrides)
    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from ham.config_files import load_config

    config = load_config(arguments.config, arguments.overrides).check_registry()
    jobs = sum(len(config.seeds_of(arm)) for arm in config.arms)
    print(f"{config.name}: valid; {len(config.arms)} arms, {jobs} jobs of an arm and a seed")
    return 0
