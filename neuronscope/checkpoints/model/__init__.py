"""Examine a checkpoint together with its model."""
