"""Bound what each neuron can output, for every input."""
