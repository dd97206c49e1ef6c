"""How a budget is spread over the axes, one file each with ``allocate``, by the file's name.

An allocation is a function from a ``Problem`` to one of the allowed counts of each of its ladders.
"""
