"""Measurements of ops, attention, the transformer and whole runs, each against what it competes
with in the same run.

Part of the checkout, not of the package: `pusa-fast bench`, or `python -m bench` from the
repository's root.
"""
