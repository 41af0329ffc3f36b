"""Merged folders to the Hugging Face Hub: whole, in one commit, and resumably."""
