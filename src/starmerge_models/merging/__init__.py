"""Planning and running merges."""
