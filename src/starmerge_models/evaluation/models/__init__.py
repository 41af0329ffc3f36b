"""Inference: loading models, prompts, generation, ranking, classification, vLLM."""
