"""Train on digits by DiLoCo: torchrun --standalone --nproc-per-node=2 examples/diloco_train.py"""

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn

from lbgm_compress import TopK
from lbgm_compress.adapters.diloco import DiLoCo

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()

images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
test_x, test_y = x[-360:], y[-360:]
train_x, train_y = x[:-360][rank::world], y[:-360][rank::world]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)

with DiLoCo(model, optimizer, TopK(1 / 64, "int2"), sync_every=20) as diloco:
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(train_x), train_y).backward()
        optimizer.step()

accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
if rank == 0:
    stats = diloco.stats()
    share = stats["message_bytes"] / (4 * sum(p.numel() for p in model.parameters()) * 200)
    print(f"accuracy {accuracy:.3f} with {share:.2%} of the bytes of dense gradients")
dist.destroy_process_group()
