"""The worth of a trained policy: the judge, the suites, the model card."""
