"""Run one cell of a comparison to its record."""
