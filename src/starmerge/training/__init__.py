"""Making adapters."""
