"""Add counts up: over calls, windows, phases and ranks."""
