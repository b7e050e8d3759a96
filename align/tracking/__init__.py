"""Experiment trackers and the wandb dashboard."""
