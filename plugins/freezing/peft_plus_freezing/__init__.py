"""Freezing schedules: which weights train when. One module per technique; import the one you want."""
