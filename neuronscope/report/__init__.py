"""Hold the results of a watch as plain data, without torch."""
