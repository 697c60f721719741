"""Tests of the whole: counts against a slow twin, and a watched run against the run that it would have been."""
