"""LoRA adapters: readers of all supported formats, and the writer."""
