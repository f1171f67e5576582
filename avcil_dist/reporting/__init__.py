"""Reports and comparisons of streams from their committed steps. No tracking server is needed."""
