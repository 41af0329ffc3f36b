"""Generators of rows: deterministic, from small packages of the ``demo`` extra, a file per topic.

The project stores no rows of these tasks.
"""
