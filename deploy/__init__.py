"""Deployment material; the demo lives here too."""
