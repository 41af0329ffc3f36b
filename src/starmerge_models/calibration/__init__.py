"""Calibration: second moments of the inputs of a base's layers, for methods that use a metric."""
