"""Tables and pages made from committed steps; no tracking server is needed."""
