"""What a run leaves for people to look at: MLflow runs, tables and pages."""
