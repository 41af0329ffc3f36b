"""Evaluation of models on tasks: prompts, inference, scoring, comparison."""
