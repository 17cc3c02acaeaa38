"""Trains Hope, the self-modifying, multi-timescale language model of the Nested Learning paper, on a cluster."""

__version__ = "0.1.0"
