"""Readers of data set listings: which clip is in which class and split, and in which file."""
