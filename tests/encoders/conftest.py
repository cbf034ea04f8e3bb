import os

import torch

# Before any library reads it: these tests must never wait for the network.
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
