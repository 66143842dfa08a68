"""Data sets and pixels: layouts, image reading and the one preprocessing function."""
