"""The wiring: a recipe, the parts it names, the run that they make. Only refine.py uses it."""
