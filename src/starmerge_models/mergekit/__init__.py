"""Support for mergekit's recipes: their translation, and the method that executes them."""
