"""Rows that are made at run time, so that none is stored in the project: a file per kind of data.

Each is made from a small package of the ``demo`` extra, the same rows in every run.
"""
