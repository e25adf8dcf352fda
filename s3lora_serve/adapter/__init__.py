"""From a folder or URL to a checked adapter in memory: copy, container, configuration, names."""
