"""Importers of features and of tars that others made."""
