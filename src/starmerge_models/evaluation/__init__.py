"""Asking models what they can do."""
