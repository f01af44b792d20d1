"""The loop and its services. Knows neither GANs, EDM nor Diff-Instruct: only phases."""
