"""Write a post-mortem as text for a terminal, markdown and HTML. Nothing here needs torch."""
