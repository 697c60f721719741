"""Tests of the core: counts against a slow twin, and a watched run against the run that it would have been."""
