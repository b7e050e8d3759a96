"""What is typed: Hydra, recipes, sweeps and the verbs beside a run."""
