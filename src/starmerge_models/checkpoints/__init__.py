"""Readers of bases, adapters and fine-tunes, and the writer of merged models."""
