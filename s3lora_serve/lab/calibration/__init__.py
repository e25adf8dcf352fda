"""Plans: gates on an adapter's directions, learnt on probes, and their measured rates."""
