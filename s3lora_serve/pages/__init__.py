"""HTML pages: those of the server, the adapter report and the registry summary."""
