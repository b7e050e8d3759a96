"""The start model and trained policies: chat format, loading, saving."""
