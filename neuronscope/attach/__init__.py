"""Attach to a model: hooks, the function mode, and what follows each tensor to its neurons."""
