"""`python -m ham`: the same as the `ham` command."""

import sys

from ham.cli import main

sys.exit(main())
