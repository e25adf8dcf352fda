"""Programs behind make targets, which measure or prove what the test suite does not."""
