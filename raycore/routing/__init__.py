"""Which engine gets a request: what a client knows of each engine's work, and the policies that choose by it. Pure."""
