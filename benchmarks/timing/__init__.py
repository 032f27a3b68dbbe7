"""The parts of ``python -m benchmarks.speed``: hosts, contestants, workloads, clock, costs, growth, tables."""
