"""Measuring: images from seeds, feature extractors, Fréchet distances, reference statistics, reports."""
