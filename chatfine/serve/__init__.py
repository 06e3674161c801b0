"""Faces of a finished model: the terminal, prompt files, batch files."""
