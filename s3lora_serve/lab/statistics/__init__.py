"""Statistics of a base model, for repair at admission."""
