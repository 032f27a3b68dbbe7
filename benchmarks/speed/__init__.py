"""Contestants that take turns: `python -m benchmarks.speed`."""
