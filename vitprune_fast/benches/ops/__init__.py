"""The races of every op, one file each: `cases`, a place -> the name of each and what runs it."""
