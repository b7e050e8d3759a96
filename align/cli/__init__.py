"""The command line: Hydra, recipes, sweeps and the verbs beside a run."""
