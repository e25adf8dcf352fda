"""Plans: what an operator's calibration removes from one adapter, in the place of the index."""
