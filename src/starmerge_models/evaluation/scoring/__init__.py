"""Scoring of answers: parsing, metrics, comparison."""
