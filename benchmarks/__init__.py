"""Measurements against every baseline; each script writes one record under ``benchmarks/results``."""
