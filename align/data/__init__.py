"""Preference pairs and prompts, from anybody's rows to token ids."""
