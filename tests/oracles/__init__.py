"""Float64 NumPy references, written from the published formulas alone."""
