"""Compute the frozen verdict on an adapter from its scores and the policy."""
