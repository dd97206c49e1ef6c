"""Races of our forms against what one would do without them, the results checked first."""
