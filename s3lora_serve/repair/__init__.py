"""Repair at admission: the statistics of a base model's inputs, read strictly; A' = A·M."""
