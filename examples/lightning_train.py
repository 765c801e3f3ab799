"""Train on handwritten digits with two processes: python examples/lightning_train.py"""

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lbgm_compress import LBGM, TopK
from lbgm_compress.adapters.lightning import CompressionCallback


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.layers(x), y)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
loader = DataLoader(TensorDataset(x[:-360], y[:-360]), batch_size=360)

L.seed_everything(0)
model = Classifier()
compression = CompressionCallback(LBGM(TopK(0.1), delta=0.2))
trainer = L.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_epochs=100,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    callbacks=[compression],
)
trainer.fit(model, loader)

accuracy = (model.layers(x[-360:]).argmax(1) == y[-360:]).float().mean().item()
ratio = compression.state.stats()["ratio"]
if trainer.is_global_zero:
    print(f"accuracy {accuracy:.3f} with {ratio:.1%} of the dense bytes")
