"""Measuring: images from seeds, features, Fréchet distances, references and reports."""
