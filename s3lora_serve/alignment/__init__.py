"""The alignment reference: made of two checkpoints, read strictly, used to project."""
