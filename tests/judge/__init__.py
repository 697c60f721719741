"""Tests of judging: what is said of a neuron, from counts alone."""
