"""Write reports as text for a terminal, markdown, HTML and TensorBoard; no writer imports another."""
