"""A method, metrics and a task for starmerge."""
