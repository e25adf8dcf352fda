"""Find adapters, copy them into private memory, and check container, configuration and names."""
