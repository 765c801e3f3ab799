"""Training in one process: K workers, a server, and real messages between them.

A method whose contributions add up is trained with `Lockstep` in the place of a server: the workers
average among themselves, and all of them take part in every round.

In a round, the sampled workers start from the global model w, take tau steps of SGD on their own
images and send the sum of the tau gradients, g. The server averages the decoded g, weighted by the
workers' numbers of images, and steps: v <- momentum * v + mean, w <- w - lr * v. With AdamW inside,
g is the difference of the weights, and the server's momentum is Nesterov's (DiLoCo, arXiv
2311.08105).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.common import lora
from benchmarks.common.data import Dataset
from benchmarks.common.models import build, parameters
from lbgm_compress import Compressor, Receiver, Sender
from lbgm_compress.algorithm import Algorithm
from lbgm_compress.collective.lockstep import Lockstep

__all__ = ["Round", "Training", "Workers", "check_sums", "evaluate", "local_updates", "run"]

# Largest number of floats of activations and gradients for workers that train in one call.
CHUNK = 32_000_000
# Floats of activations for each number of the input, for models with many.
ACTIVATIONS = {"small-cnn": 20, "transformer": 5000}
# Inside vmap, convolutions with a kernel for each worker are slower than one after the other.
ONE_BY_ONE = ("cnn", "resnet18", *lora.MODELS)
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
    server_adamw: bool = False
    """If the server steps by AdamW with the learning rate `lr`, and not by momentum."""

    def evaluated(self, number: int) -> bool:
        """Return True if the model is evaluated after this round."""
        return number == 1 or number % self.evaluate_every == 0 or number == self.rounds

    def sampled(self) -> int:
        """Return the number of workers that take part in a round."""
        return max(1, round(self.participation * len(self.parts)))

    def initial_model(self) -> nn.Module:
        """Return the model that every method starts from."""
        if self.model in lora.MODELS:
            return lora.adapted(lora.MODELS[self.model], self.seed).to(self.device)
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
    """Size of what all sampled workers send: messages, or numbers that are added up."""
    recycled_share: float
    """Share of tensors sent as look-back coefficients alone."""
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


def check_sums(method: Algorithm, participation: float, open_loop: bool = False) -> None:
    """Check that a method, if its contributions add up, can be trained so.

    Raises
    ------
    ValueError
        If not all workers take part in every round, or updates are not to be compressed.
    """
    if not method.adds_up:
        return
    if participation != 1:
        raise ValueError(
            f"{method!r} averages by sums over all workers, and --participation is "
            f"{participation:g}: use 1"
        )
    if open_loop:
        raise ValueError(f"{method!r} makes no messages that --open-loop could measure")


class Exchanged(NamedTuple):
    """The average of a round, and what was sent for it by all workers that took part."""

    average: Parameters
    bytes: int
    recycled: int
    """Tensors sent as coefficients alone."""
    tensors: int


class Exchange(Protocol):
    """Averages updates of sampled workers."""

    def average(self, updates: Parameters, sampled: list[int]) -> Exchanged:
        """Return the average, weighted by numbers of images.

        Parameters
        ----------
        updates
            The updates of the sampled workers, stacked along a first axis.
        sampled
            The numbers of the workers.
        """


class Messages:
    """A sender for each worker, and a server that decodes their messages."""

    def __init__(self, training: Training, compressor: Compressor, sizes: Sequence[int]) -> None:
        weights = parameters(training.initial_model())
        self._senders = [Sender(compressor, seed=worker) for worker in range(len(sizes))]
        self._receiver = Receiver(compressor, like=weights)
        self._sizes = sizes
        self._open_loop = training.open_loop

    def average(self, updates: Parameters, sampled: list[int]) -> Exchanged:
        """Return what the server decodes; in open loop the average before compression."""
        total = sum(self._sizes[worker] for worker in sampled)
        mean = {name: torch.zeros_like(g[0]) for name, g in updates.items()}
        # In open loop, messages are decoded into tensors that are not used.
        into = {name: torch.zeros_like(m) for name, m in mean.items()} if self._open_loop else mean
        sent = recycled = tensors = 0
        for i, worker in enumerate(sampled):
            message = self._senders[worker].compress({name: g[i] for name, g in updates.items()})
            share = self._sizes[worker] / total
            self._receiver.accumulate(worker, message, into, share)
            if self._open_loop:
                for name, g in updates.items():
                    mean[name].add_(g[i], alpha=share)
            sent += message.numel()
            report = self._senders[worker].report().values()
            recycled += sum(tensor.recycled for tensor in report)
            tensors += len(report)
        average = mean if self._open_loop else self._receiver.finish(mean)
        return Exchanged(average, sent, recycled, tensors)


class Sums:
    """Workers whose contributions add up; all of them take part."""

    def __init__(self, training: Training, method: Algorithm, sizes: Sequence[int]) -> None:
        check_sums(method, training.participation, training.open_loop)
        self._workers = Lockstep(method, len(sizes))
        self._shares = [size / sum(sizes) for size in sizes]

    def average(self, updates: Parameters, sampled: list[int]) -> Exchanged:
        """Return the average that all workers have."""
        grads = [{name: g[worker] for name, g in updates.items()} for worker in sampled]
        average = self._workers.average(grads, self._shares)
        # The reports of all workers are the same.
        report = self._workers.workers[0].report().values()
        recycled = sum(tensor.recycled for tensor in report)
        return Exchanged(average, self._workers.bytes * len(sampled), recycled, len(report))


def run(training: Training, method: Algorithm) -> Iterator[Round]:
    """Train with one method, and yield every round as it ends.

    Raises
    ------
    ValueError
        If the method needs all workers in every round, and not all take part.
    """
    model = training.initial_model()
    weights = parameters(model)
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=training.lr, weight_decay=0.0)
    workers = Workers(training)
    kind = Sums if method.adds_up else Messages
    exchange: Exchange = kind(training, method, workers.sizes)
    sampler = torch.Generator().manual_seed(training.seed)
    test = (
        training.dataset.test_images.to(training.device),
        training.dataset.test_labels.to(training.device),
    )
    update = local_updates(model, training, workers)
    accuracy = loss = 0.0
    for number in range(1, training.rounds + 1):
        start = time.perf_counter()
        order = torch.randperm(len(workers.sizes), generator=sampler)
        sampled = sorted(order[: training.sampled()].tolist())
        exchanged = exchange.average(update(weights, sampled), sampled)
        if training.server_adamw:
            for name, weight in weights.items():
                weight.grad = exchanged.average[name]
            optimizer.step()
        for name, step in ({} if training.server_adamw else exchanged.average).items():
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
            exchanged.bytes,
            exchanged.recycled / exchanged.tensors,
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
