"""The training of a policy on pairs."""
