"""Processes of a run: starting them, their ranks, the strategy they share, SLURM."""
