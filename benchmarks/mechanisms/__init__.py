"""Experiments whose truth is known: what a method can learn, told apart from what a benchmark happens to reward."""
