"""Tests of attaching: what is a neuron, which calls are seen, and that nothing of the run changes."""
