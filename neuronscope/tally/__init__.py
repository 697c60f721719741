"""Add up counts over calls, windows, phases and ranks."""
