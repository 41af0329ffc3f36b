"""Results of other programs that ours are compared with."""
