"""fewstep: distil a diffusion model into a one- to four-step generator (DMD2, arXiv 2405.14867)."""

__version__ = "0.1.0"
