"""Streams that are killed again and again: the same bits, nothing lost, nothing twice."""
