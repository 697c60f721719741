"""Examine checkpoints: which neurons of a saved network are dead, since when, how sure that is, and why."""
