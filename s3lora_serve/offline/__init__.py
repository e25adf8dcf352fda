"""What is done with adapters that are not being served: scan, strip, export, summarise."""
