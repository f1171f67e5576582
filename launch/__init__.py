"""Starts things: the command line and the processes of a run."""
