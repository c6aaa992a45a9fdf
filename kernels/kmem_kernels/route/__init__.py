"""Which experts a token visits, and with which weights."""
