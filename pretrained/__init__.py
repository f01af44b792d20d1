"""Files of pretrained networks, read as data, and written back."""
