"""Enforcement inside vLLM. Imports nothing: vLLM skips a plugin that fails to import."""
