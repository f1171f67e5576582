"""Settings as typed models, and how two configurations compare."""
