"""The embedded example: a real base, eight real adapters, their merges, a table and a chart."""
