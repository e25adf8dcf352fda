"""Pages of what the lab finds."""
