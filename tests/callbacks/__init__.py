"""Tests of the Lightning callback: the same small runs with and without it, and counts made by hand beside its own."""
