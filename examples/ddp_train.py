"""Train on handwritten digits: torchrun --standalone --nproc-per-node=2 examples/ddp_train.py"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lbgm_compress import LBGM, TopK
from lbgm_compress.adapters.ddp import compress

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
test_x, test_y = x[-360:], y[-360:]
train_x, train_y = x[:-360][rank::world], y[:-360][rank::world]

torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)))

state = compress(model, LBGM(TopK(0.1), delta=0.2))

optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(train_x), train_y).backward()
    optimizer.step()

accuracy = (model.module(test_x).argmax(1) == test_y).float().mean().item()
if rank == 0:
    stats = state.stats()
    print(f"accuracy {accuracy:.3f} with {stats['ratio']:.1%} of the dense bytes")
dist.destroy_process_group()
