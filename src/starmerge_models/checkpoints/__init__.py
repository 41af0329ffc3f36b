"""Reading bases, adapters and fine-tunes; writing merged models."""
