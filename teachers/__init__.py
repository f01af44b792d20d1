"""Denoisers, one file a family: pretrained diffusion networks, and analytic ones for tests."""
