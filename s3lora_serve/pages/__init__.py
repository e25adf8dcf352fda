"""Pages for people: the server's own, and parts that other reports are made of."""
