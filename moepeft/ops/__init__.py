"""Arithmetic that several methods use: pure functions on tensors."""
