"""Read checkpoints: one module per format, and what they share: byte ranges, tensors in files, pickles without code.

Nothing here imports or calls what a checkpoint names, and no tensor is read before it is asked for.
"""
