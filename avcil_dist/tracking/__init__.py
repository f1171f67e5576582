"""Tracking of streams in MLflow: event queue, sender, artifacts, sessions, resumption, model registry."""

from avcil_dist.tracking.environment import quiet_import

quiet_import()
