"""Who vouches for an adapter: signatures on its folder, and attested verdicts."""
