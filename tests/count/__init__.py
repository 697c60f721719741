"""Tests of counting: zeros of a tensor, on each kind of device, against plain formulas."""
