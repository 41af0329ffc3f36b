"""What answers are worth: how they are read, scored and compared."""
