"""Mutation testing of the packages, by `python -m tests.mutants`."""
