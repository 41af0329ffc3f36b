"""Looking at task vectors before a merge, and after one: spectra, conflicts, what is kept."""
