"""Each writer draws a :class:`neuronscope.Report`; none knows another."""
