"""Measurements: never packaged; each writes a CSV with provenance into `benchmarks/results/`."""
