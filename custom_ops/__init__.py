"""The signal-processing operations of the StyleGAN family, each with its definition in the
docstring.
"""
