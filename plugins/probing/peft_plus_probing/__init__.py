"""Probing: what a frozen model knows, and head-first training. One module per technique; import the one you want."""
