"""The command line: `vitprune-fast VERB`, one file per verb."""
