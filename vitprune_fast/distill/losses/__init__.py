"""The losses that a student learns from its teachers: one file each, and its name is the loss's.

A file holds a subclass of ``_base.Loss`` called like it (``soft_deit.py``: ``SoftDeit``). Settings,
command line, curves and progress know a loss by the name of its file and by the first line of its
docstring.
"""
