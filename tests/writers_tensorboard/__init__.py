"""Tests of the pictures and of the TensorBoard writer."""
