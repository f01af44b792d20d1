"""Sets of real images, for reference statistics and for the training of denoisers."""
