"""Examine a checkpoint file alone: weights, optimizer state, the monitor's record."""
