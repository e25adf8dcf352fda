"""What runs in the API server: registration, HTTP routes, pages."""
