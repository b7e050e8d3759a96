"""Where a run runs: its processes, their strategy, SLURM."""
