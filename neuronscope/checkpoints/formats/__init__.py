"""One module per format of checkpoints, and what they share: bytes of a file, a tensor that lies in it, inert pickles.

Nothing here imports what a checkpoint names, calls what it asks to be called, or reads a number before it is wanted.
"""
