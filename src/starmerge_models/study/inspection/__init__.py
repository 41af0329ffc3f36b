"""Analysis of task vectors: spectra, conflicts, and how much of each task a merge keeps."""
