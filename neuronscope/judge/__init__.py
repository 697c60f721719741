"""Decide what counts mean: verdicts, symptoms and diagnosis, as pure functions without torch."""
