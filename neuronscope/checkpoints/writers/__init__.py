"""Drawing a post-mortem: on a terminal, as markdown, as an HTML page. No torch here, and none knows another."""
