"""Metrics, log and audit log: they record decisions and change none."""
