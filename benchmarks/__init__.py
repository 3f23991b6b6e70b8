"""Measurements: what techniques do on real models and data, and what they cost."""
