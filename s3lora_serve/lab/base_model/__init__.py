"""The base model on the operator's machine, the probes put to it, and the judge of answers."""
