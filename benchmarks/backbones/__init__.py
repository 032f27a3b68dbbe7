"""Models by name, by path and from nothing."""
