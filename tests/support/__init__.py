"""Shared by tests, benchmarks and the demo: a tiny model, real adapters for it, a real server."""
