"""Speeds and results that docs/ quotes; each file runs as `python -m benchmarks.NAME`."""
