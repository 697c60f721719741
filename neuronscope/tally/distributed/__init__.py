"""Join the counts of all ranks of a distributed run."""
