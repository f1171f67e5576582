"""A two-node SLURM with accounting on one machine, for tests and for trying things before the cluster."""
