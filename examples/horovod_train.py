"""Train on handwritten digits: horovodrun -np 2 --gloo python examples/horovod_train.py"""

import horovod.torch as hvd
import torch
from sklearn.datasets import load_digits
from torch import nn

from lbgm_compress import LBGM, TopK
from lbgm_compress.adapters.horovod import DistributedOptimizer

hvd.init()
rank, world = hvd.rank(), hvd.size()

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
test_x, test_y = x[-360:], y[-360:]
train_x, train_y = x[:-360][rank::world], y[:-360][rank::world]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
hvd.broadcast_parameters(model.state_dict(), root_rank=0)

compressor = LBGM(TopK(0.1), delta=0.2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer = DistributedOptimizer(optimizer, compressor, model.named_parameters())

for _ in range(200):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(train_x), train_y).backward()
    optimizer.step()

accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
if rank == 0:
    stats = optimizer.compression.stats()
    print(f"accuracy {accuracy:.3f} with {stats['ratio']:.1%} of the dense bytes")
