"""The start model and the policies made of it: how they speak, load and are saved."""
