"""Fast paths of definitions."""
