"""One incremental step: engine, teacher, evaluation, step artifact."""
