"""`python -m bench.evidence`."""

from bench.evidence.runs import main

main()
