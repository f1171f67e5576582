"""Use of committed steps: predictions, evaluations, and the attention on clips."""
