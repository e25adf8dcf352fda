"""Calibration: learns, on an operator's probes, what to remove from one adapter; writes a plan."""
