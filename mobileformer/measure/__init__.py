"""Measuring: contenders in turns, differences from a reference, the machine it was done on."""
