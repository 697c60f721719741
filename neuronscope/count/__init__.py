"""Count zeros in tensors: per-neuron int64 counts, and nothing that knows a threshold."""
