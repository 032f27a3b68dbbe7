"""Clocks and gauges."""
