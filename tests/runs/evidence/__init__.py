"""Evidence on a real language model: `make evidence` runs it and writes RESULTS.md."""
