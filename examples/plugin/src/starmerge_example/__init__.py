"""A method, metrics, a matcher and a task for starmerge."""
