"""The rules of the torch functions, by subject; :mod:`neuronscope.attach.operators` puts them together."""
