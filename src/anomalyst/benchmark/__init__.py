"""Protocols, methods, variants, shots, seeds and categories to a table of figures."""
