"""Frozen backbones: what there is, where their weights come from, their features, and a cache."""
