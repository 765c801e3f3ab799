"""Training in one process: K workers, a server, and real messages between them.

In a round, the sampled workers start from the global model w, take tau steps of SGD on their own
images and send the sum of the tau gradients, g. The server averages the decoded g, weighted by the
workers' numbers of images, and steps: v <- momentum * v + mean, w <- w - lr * v. With AdamW inside,
g is the difference of the weights, and the server's momentum is Nesterov's (DiLoCo, arXiv
2311.08105).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.common.data import Dataset
from benchmarks.common.models import build, parameters
from lbgm_compress import Compressor, Receiver, Sender

__all__ = ["Round", "Training", "Workers", "evaluate", "local_updates", "run"]

# Largest number of floats of activations and gradients for workers that train in one call.
CHUNK = 32_000_000
# Floats of activations for each number of the input, for models with many.
ACTIVATIONS = {"small-cnn": 20, "transformer": 5000}
# Inside vmap, convolutions with a kernel for each worker are slower than one after the other.
ONE_BY_ONE = ("cnn", "resnet18")
Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Training:
    """The training that all methods of a comparison have in common."""

    dataset: Dataset
    parts: list[Tensor]
    model: str
    rounds: int
    local_steps: int
    batch_size: int | None
    participation: float
    lr: float
    server_momentum: float
    seed: int
    device: torch.device
    evaluate_every: int = 1
    """Rounds from one evaluation to the next; rounds between repeat its accuracy."""
    open_loop: bool = False
    """If the server steps with the updates as they were before compression."""
    adamw_lr: float | None = None
    """If given, workers step by AdamW with this learning rate, and keep its moments."""

    def evaluated(self, number: int) -> bool:
        """Return True if the model is evaluated after this round."""
        return number == 1 or number % self.evaluate_every == 0 or number == self.rounds

    def sampled(self) -> int:
        """Return the number of workers that take part in a round."""
        return max(1, round(self.participation * len(self.parts)))

    def initial_model(self) -> nn.Module:
        """Return the model that every method starts from."""
        image = tuple(self.dataset.train_images.shape[1:])
        return build(self.model, image, self.dataset.classes, self.seed).to(self.device)


@dataclass(frozen=True)
class Round:
    """The results of one round of one method."""

    number: int
    accuracy: float
    """Share of the test images that the global model classifies correctly."""
    loss: float
    """Mean cross-entropy on the test images."""
    uplink_bytes: int
    """Size of the messages of all sampled workers."""
    recycled_share: float
    """Share of tensors sent as a look-back coefficient alone."""
    seconds: float
    wire_bytes: int | None = None
    """Bytes on the network interface, headers included; None if the engine uses none."""
    evaluated: bool = True
    """True if accuracy and loss are of this round, False if of an earlier evaluation."""


class Workers:
    """The workers' images, stacked so that many workers train in one call."""

    def __init__(self, training: Training) -> None:
        images, labels = training.dataset.train_images, training.dataset.train_labels
        self.sizes = [len(part) for part in training.parts]
        self.batch = training.batch_size
        longest = max(self.sizes)
        # Shorter parts repeat their first image, with weight 0 in the loss.
        rows = torch.stack([torch.cat([p, p[:1].expand(longest - len(p))]) for p in training.parts])
        self.images = images[rows].to(training.device)
        self.labels = labels[rows].to(training.device)
        valid = torch.arange(longest)[None, :] < torch.tensor(self.sizes)[:, None]
        self.weights = (valid / torch.tensor(self.sizes)[:, None]).float().to(training.device)
        self.generators = [
            torch.Generator().manual_seed(1_000_003 * training.seed + worker)
            for worker in range(len(self.sizes))
        ]
        self.orders = [torch.empty(0, dtype=torch.int64) for _ in self.sizes]

    def next_batch(self, workers: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (S, B, 1, H, W), labels (S, B) and weights (S, B) of the next step."""
        if self.batch is None or self.batch >= max(self.sizes):
            if workers == list(range(len(self.sizes))):
                return self.images, self.labels, self.weights
            return self.images[workers], self.labels[workers], self.weights[workers]
        rows = torch.zeros(len(workers), self.batch, dtype=torch.int64)
        weights = torch.zeros(len(workers), self.batch)
        for i, worker in enumerate(workers):
            if not len(self.orders[worker]):
                size = self.sizes[worker]
                self.orders[worker] = torch.randperm(size, generator=self.generators[worker])
            taken, self.orders[worker] = self.orders[worker].split(
                [
                    min(self.batch, len(self.orders[worker])),
                    max(0, len(self.orders[worker]) - self.batch),
                ]
            )
            rows[i, : len(taken)] = taken
            weights[i, : len(taken)] = 1 / len(taken)
        index = torch.tensor(workers)[:, None].to(self.images.device), rows.to(self.images.device)
        return self.images[index], self.labels[index], weights.to(self.images.device)


def run(training: Training, compressor: Compressor) -> Iterator[Round]:
    """Train with one compressor, and yield every round as it ends."""
    model = training.initial_model()
    weights = parameters(model)
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    workers = Workers(training)
    senders = [Sender(compressor, seed=worker) for worker in range(len(workers.sizes))]
    receiver = Receiver(compressor, like=weights)
    sampler = torch.Generator().manual_seed(training.seed)
    test = (
        training.dataset.test_images.to(training.device),
        training.dataset.test_labels.to(training.device),
    )
    update = local_updates(model, training, workers)
    accuracy = loss = 0.0
    for number in range(1, training.rounds + 1):
        start = time.perf_counter()
        order = torch.randperm(len(senders), generator=sampler)
        sampled = sorted(order[: training.sampled()].tolist())
        total = sum(workers.sizes[worker] for worker in sampled)
        mean = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        # In open loop, messages are decoded into tensors that are not used.
        into = mean
        if training.open_loop:
            into = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        uplink = recycled = tensors = 0
        updates = update(weights, sampled)
        for i, worker in enumerate(sampled):
            message = senders[worker].compress({name: g[i] for name, g in updates.items()})
            share = workers.sizes[worker] / total
            receiver.accumulate(worker, message, into, share)
            if training.open_loop:
                for name, g in updates.items():
                    mean[name].add_(g[i], alpha=share)
            uplink += message.numel()
            report = senders[worker].report().values()
            recycled += sum(tensor.recycled for tensor in report)
            tensors += len(report)
        steps = mean if training.open_loop else receiver.finish(mean)
        for name, step in steps.items():
            velocity[name].mul_(training.server_momentum).add_(step)
            move = velocity[name]
            if training.adamw_lr is not None:
                move = step + training.server_momentum * move
            weights[name] = weights[name] - training.lr * move
        if training.evaluated(number):
            accuracy, loss = evaluate(model, weights, *test)
        seconds = time.perf_counter() - start
        yield Round(
            number,
            accuracy,
            loss,
            uplink,
            recycled / tensors,
            seconds,
            evaluated=training.evaluated(number),
        )


def local_updates(
    model: nn.Module, training: Training, workers: Workers
) -> Callable[[Parameters, list[int]], Parameters]:
    """Return a function that returns the sampled workers' updates, stacked along a first axis."""

    def loss(weights: Parameters, images: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        logits = functional_call(model, weights, (images,))
        losses = nn.functional.cross_entropy(_classes_second(logits), labels, reduction="none")
        return (losses.flatten(1).mean(1) if losses.dim() > 1 else losses).mul(share).sum()

    gradient = grad(loss)
    size = sum(weight.numel() for weight in model.parameters())

    def step(weights: Parameters, batch: tuple[Tensor, Tensor, Tensor], shared: bool) -> Parameters:
        images, labels, shares = batch
        count = len(images)
        if training.model in ONE_BY_ONE:
            each = [
                gradient(
                    weights if shared else {name: w[i] for name, w in weights.items()},
                    images[i],
                    labels[i],
                    shares[i],
                )
                for i in range(count)
            ]
            return {name: torch.stack([g[name] for g in each]) for name in each[0]}
        chunk = max(1, CHUNK // (2 * size + ACTIVATIONS.get(training.model, 2) * images[0].numel()))
        in_dims = (None if shared else 0, 0, 0, 0)
        return vmap(gradient, in_dims=in_dims, chunk_size=chunk)(weights, images, labels, shares)

    if training.adamw_lr is not None:
        return _adamw_updates(step, training, workers)

    def updates(weights: Parameters, sampled: list[int]) -> Parameters:
        total = step(weights, workers.next_batch(sampled), shared=True)
        if training.local_steps > 1:
            local = {name: w - training.lr * total[name] for name, w in weights.items()}
            for _ in range(training.local_steps - 1):
                grads = step(local, workers.next_batch(sampled), shared=False)
                for name, g in grads.items():
                    total[name] += g
                    local[name] -= training.lr * g
        return total

    return updates


def _adamw_updates(
    gradients: Callable[..., Parameters], training: Training, workers: Workers
) -> Callable[[Parameters, list[int]], Parameters]:
    """Return what `local_updates` does, for AdamW with its defaults beside the learning rate."""
    moments: list[torch.optim.AdamW | None] = [None] * len(workers.sizes)
    local: list[Parameters] = [{} for _ in workers.sizes]

    def updates(weights: Parameters, sampled: list[int]) -> Parameters:
        for worker in sampled:
            if moments[worker] is None:
                local[worker] = {name: w.clone() for name, w in weights.items()}
                moments[worker] = torch.optim.AdamW(
                    local[worker].values(), lr=training.adamw_lr or 0.0, fused=True
                )
            for name, own in local[worker].items():
                own.copy_(weights[name])
        for _ in range(training.local_steps):
            stacked = {n: torch.stack([local[worker][n] for worker in sampled]) for n in weights}
            grads = gradients(stacked, workers.next_batch(sampled), shared=False)
            for i, worker in enumerate(sampled):
                for name, own in local[worker].items():
                    own.grad = grads[name][i]
                optimizer = moments[worker]
                assert optimizer is not None
                optimizer.step()
        return {
            n: torch.stack([weights[n] - local[worker][n] for worker in sampled]) for n in weights
        }

    return updates


def _classes_second(logits: Tensor) -> Tensor:
    """Return logits (B, T, classes) with the classes second, as cross-entropy takes them."""
    return logits.transpose(1, 2) if logits.dim() == 3 else logits


@torch.no_grad()
def evaluate(
    model: nn.Module, weights: Parameters, images: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Return the share of labels that the model predicts, and the mean cross-entropy."""
    # Activations of a large model need much memory.
    together = 5000 if sum(weight.numel() for weight in weights.values()) < 5_000_000 else 250
    right = loss = 0.0
    for part, truth in zip(images.split(together), labels.split(together), strict=True):
        logits = _classes_second(functional_call(model, weights, (part,)))
        loss += nn.functional.cross_entropy(logits, truth, reduction="sum").item()
        right += (logits.argmax(1) == truth).sum().item()
    return right / labels.numel(), loss / labels.numel()
