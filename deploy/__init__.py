"""Deployment files, their generator, and the demo."""
