"""A stream as a chain of jobs, one for each step."""
