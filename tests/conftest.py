"""Settings of the whole suite. One thread: two cores are soon full of ranks."""

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
