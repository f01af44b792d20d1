"""Networks that ship with the project, and their training programs."""
