"""Benchmarks, one program a claim: `python -m tools.benchmark.NAME`, or `make bench` for all."""
