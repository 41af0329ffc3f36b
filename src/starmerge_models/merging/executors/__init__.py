"""Executors of the work of a merge: threads of this process, or workers of a Ray cluster."""
