"""Fine-tuning of adapters and whole models."""
