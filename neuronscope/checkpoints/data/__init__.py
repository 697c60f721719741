"""Measure a checkpoint's network on data."""
