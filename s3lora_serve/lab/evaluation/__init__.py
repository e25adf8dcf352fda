"""Evaluations of an adapter on a running guarded server, under several settings."""
