"""`python -m vitprune_fast`: the command line, as `torchrun -m` starts it."""

from __future__ import annotations

import sys

from vitprune_fast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
