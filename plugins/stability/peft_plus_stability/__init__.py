"""Stability: forgetting less, varying less between seeds. One module per technique; import the one you want."""
