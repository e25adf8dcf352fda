"""What runs in each worker: loading, enforcement, skipping."""
