"""Longtake trains image and video diffusion transformers fast."""

__version__ = "0.1.0"
