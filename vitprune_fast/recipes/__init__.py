"""The ways to a smaller model as data, one file each, found by their names.

A recipe is a module here with ``RECIPE``: a list of steps, and the settings it comes with.
"""
