"""What a student learns from: one paper, one file."""
