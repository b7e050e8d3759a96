"""Scorers judge how good responses are. One interface (base.py), one file per scorer, `registry.build` makes one."""
