"""`make attacks`: adapters of owners who know the gate, and what each defence does to them."""
