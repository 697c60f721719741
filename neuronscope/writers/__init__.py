"""Write reports as text for a terminal, markdown, JSON, HTML and TensorBoard; no writer imports another."""
