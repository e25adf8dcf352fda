"""Stored copies of admitted adapters: content addressing, pins of living processes, eviction."""
