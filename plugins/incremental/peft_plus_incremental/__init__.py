"""Pacing of the data: what is seen when. One module per technique; import the one you want."""
