"""Tests of the search for layers that act as one linear map."""
