"""Benchmarks of the package: `make bench` measures, `python -m bench.report` writes the tables."""
