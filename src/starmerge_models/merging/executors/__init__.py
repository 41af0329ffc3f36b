"""Who carries out the work of a merge: threads of this process."""
