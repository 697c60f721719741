"""Bound what each neuron can give for any input."""
