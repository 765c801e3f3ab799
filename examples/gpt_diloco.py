"""Train a small GPT by DiLoCo: torchrun --standalone --nproc-per-node=2 examples/gpt_diloco.py

The text is the source of modules of Python, byte by byte: each worker has modules of its own.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from lbgm_compress import TopK
from lbgm_compress.adapters.diloco import DiLoCo

CONTEXT, WIDTH, HEADS, LAYERS, BATCH = 64, 64, 4, 2, 16
STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 300
MODULES = ["argparse", "ast", "difflib", "inspect", "optparse", "pickle", "tarfile", "typing"]


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.positions = nn.Parameter(torch.zeros(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, LAYERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))
        nn.init.normal_(self.bytes.weight, std=0.1)

    def forward(self, text):
        hidden = self.bytes(text) + self.positions
        return self.blocks(hidden, self.mask, is_causal=True) @ self.bytes.weight.t()


def text_of(modules):
    files = [Path(os.__file__).with_name(f"{module}.py") for module in modules]
    data = bytearray(b"".join(file.read_bytes() for file in files))
    return torch.frombuffer(data, dtype=torch.uint8).long()


def loss_of(model, text, generator):
    starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=generator)
    rows = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
    return nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
text, generator = text_of(MODULES[rank::world]), torch.Generator().manual_seed(rank)
model = GPT()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

with DiLoCo(model, optimizer, TopK(1 / 64, "int2"), sync_every=15) as diloco:
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, text, generator).backward()
        optimizer.step()

if rank == 0:
    with torch.no_grad():
        loss = sum(loss_of(model, text_of(["shutil"]), generator).item() for _ in range(10)) / 10
    bits = diloco.stats()["bits_per_step"]
    print(f"loss {loss:.3f} on another module, with {bits:.3f} bits a parameter and step")
dist.destroy_process_group()
