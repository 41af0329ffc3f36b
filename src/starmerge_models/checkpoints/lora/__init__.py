"""LoRA adapters: the layouts that people have them in, read into the same factors, and ours."""
