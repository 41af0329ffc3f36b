"""How models are loaded and asked: prompts, generation, ranking, classification, vLLM."""
