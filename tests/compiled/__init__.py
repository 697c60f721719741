"""Tests of compiled graphs: one graph, eager's counts, and the weights of the unwatched run."""
