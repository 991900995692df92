"""Benchmarks: they measure and never assert. docs/performance.md has the protocol."""
