"""Comparison of merges: studies, choices, inspections, figures and report pages."""
