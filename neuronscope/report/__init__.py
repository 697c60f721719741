"""Hold what there is to show, as plain data without torch."""
