"""Caches of planned patterns, on the host and on devices."""
