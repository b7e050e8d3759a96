"""The command line: Hydra, recipes and sweeps."""
