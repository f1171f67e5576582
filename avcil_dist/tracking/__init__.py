"""Tracking of streams in MLflow: event queue, sender, artifacts, sessions, resumption, model registry."""
