"""A report of a run: data, text, figures, pages."""
