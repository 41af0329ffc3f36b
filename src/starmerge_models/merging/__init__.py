"""Planning a merge and carrying it out."""
