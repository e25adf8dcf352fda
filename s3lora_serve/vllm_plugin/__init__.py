"""The vLLM plugin, the only package that knows vLLM.

Nothing is imported here: vLLM logs and skips a plugin that fails to import.
"""
