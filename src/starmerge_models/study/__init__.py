"""Looking at many merges and evaluations."""
