"""Second moments of the inputs of a base, for the methods that ask what its inputs are like."""
