"""What no server runs: making plans, statistics and references, comparing settings, sweeps."""
