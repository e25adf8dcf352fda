"""Metrics, log and audit log. They record decisions and do not change them."""
