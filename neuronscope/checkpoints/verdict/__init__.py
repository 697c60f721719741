"""Combine the evidence on each neuron into one verdict."""
