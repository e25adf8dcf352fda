"""The operator's policy: its schema, its file, and its reload in a running server."""
