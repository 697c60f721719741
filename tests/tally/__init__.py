"""Tests of what is kept: windows, phases, histories, totals and saved states."""
