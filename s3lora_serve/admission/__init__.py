"""Scores and a policy in, a frozen verdict out."""
