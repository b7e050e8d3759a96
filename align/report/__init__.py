"""Runs side by side: run folders in; one page, one Markdown file and one table of figures out."""
