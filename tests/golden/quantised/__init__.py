"""Small quantised weights, and the numbers that the formats' own libraries read in them."""
