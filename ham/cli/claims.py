"""`ham claims`: what result rows say about the claims that were stated before the runs."""

from __future__ import annotations

import argparse
from pathlib import Path


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parser of `ham claims`."""
    parser = subparsers.add_parser(
        "claims", help="supported, refuted, inconclusive or not run: the ledger of claims"
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="DIR",
        help="folders with *.rows.jsonl files (each is one run), or such files",
    )
    parser.add_argument(
        "--claims", metavar="FILE", help="claims file (default: workflow/config/claims.yaml)"
    )
    parser.add_argument("--only", nargs="+", metavar="ID", help="print these claims alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the ledger. Holm's correction runs over all claims of the file, printed or not."""
    import json

    from ham.claims.config import load_claims, shipped_claims
    from ham.claims.evidence import read_evidence
    from ham.claims.judge import judge
    from ham.claims.ledger import as_records, as_text
    from ham.claims.vocabulary import check_names
    from ham.errors import unknown_choice

    claims = load_claims(arguments.claims or shipped_claims())
    ids = [claim.id for claim in claims.claims]
    for name in arguments.only or ():
        if name not in ids:
            raise unknown_choice("claim", name, ids)
    places = [Path(place).as_posix() for place in arguments.places]
    evidence = read_evidence(places)
    check_names(claims, evidence)
    judged = judge(claims, evidence)
    if arguments.only:
        judged = [one for one in judged if one.claim.id in arguments.only]
    if arguments.json:
        record = as_records(judged, places, arguments.claims)
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print(as_text(judged, places, arguments.claims))
    return 0
