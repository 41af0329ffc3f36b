"""Pushes merged folders to the Hugging Face Hub: complete, in one commit, resumable."""
