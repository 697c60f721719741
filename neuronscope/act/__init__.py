"""Act on verdicts: know the weights of each neuron, take dead neurons out."""
