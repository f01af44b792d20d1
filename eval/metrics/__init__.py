"""The metrics, one file each: a module with METRICS is found by its name in this folder."""
