"""Many adapters at once: scans of registries, on one machine or a Ray cluster."""
