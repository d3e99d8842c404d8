"""Published weights: mapping tables, and the files they are in."""
