"""What several methods share, and no paper has for itself."""
