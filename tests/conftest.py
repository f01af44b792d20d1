"""What holds for every test: one thread, since the networks are too small to share out."""

import torch

torch.set_num_threads(1)
