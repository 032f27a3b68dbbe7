"""What was found, one validated record per cell."""
