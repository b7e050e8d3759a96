"""What a trained policy is worth: the judge, the suites, the model card."""
