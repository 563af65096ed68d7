"""One thread: two OpenMP pools on the same cores are ten to thirty times slower than one thread each."""

import torch

torch.set_num_threads(1)
