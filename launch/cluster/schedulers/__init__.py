"""Schedulers behind one protocol."""
