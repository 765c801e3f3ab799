"""Train on digits: torchrun --standalone --nproc-per-node=2 examples/trainer_train.py"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from lbgm_compress import ErrorFeedback, SharedSubspace
from lbgm_compress.adapters.transformers import CompressionCallback

images, labels = load_digits(return_X_y=True)
pixels = torch.tensor(images / 8 - 1, dtype=torch.float32).view(-1, 1, 8, 8)
data = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]

set_seed(0)
model = ViTForImageClassification(
    ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="digits",
        use_cpu=True,
        max_steps=200,
        learning_rate=0.002,
        per_device_train_batch_size=64,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
    ),
    train_dataset=data[:-360],
    eval_dataset=data[-360:],
    compute_metrics=lambda found: {"accuracy": np.mean(found[0].argmax(1) == found[1])},
    callbacks=[CompressionCallback(ErrorFeedback(SharedSubspace(4)))],
)
trainer.train()
accuracy = trainer.evaluate()["eval_accuracy"]
ratio = next(log["compression/ratio"] for log in trainer.state.log_history[::-1] if "loss" in log)
if trainer.is_world_process_zero():
    print(f"accuracy {accuracy:.3f} with {ratio:.1%} of the dense bytes")
