"""On-policy data: responses of the current policy, their scores, and the pairs to train on."""
