"""The operating system: signals, start of processes, files that may be loaded as code."""
