"""Diagnosis of a machine and of a cluster before they are used."""
