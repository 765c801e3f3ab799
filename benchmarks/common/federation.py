"""A federation in one process: sampled clients, and messages in both directions.

The server has the model x, and its clients hold w, which follows x by the messages of a `Publisher`
(without a downlink, w is x, and travels dense). In a round, sampled clients
are brought up to date, take tau steps of SGD on their own images and send the sum of the tau
gradients. The server averages what it decodes, weighted by numbers of images, and steps. Then as
many clients, sampled anew, are brought up to date for an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.common.models import parameters
from benchmarks.common.training import Parameters, Training, Workers, evaluate
from lbgm_compress import Compressor, Receiver, Sender
from lbgm_compress.endpoints import Publisher
from lbgm_compress.endpoints.downlink import Whole

__all__ = ["FederatedRound", "Method", "federate"]

# The version and the number of messages of an update, and the length of each message, in bytes.
HEAD, LENGTH = 18, 3


class Method(NamedTuple):
    """A way to send models and updates."""

    uplink: Compressor
    downlink: Compressor | None
    """None: whole models in float32."""
    first: str
    """The precision in which a whole model travels."""
    residual: str
    """The place of what a client has not sent: its "memory", or the "model" that it starts from."""


class FederatedRound(NamedTuple):
    """The results of a round; bytes are those of all clients in it."""

    number: int
    accuracy: float | None
    """Accuracy of x on the test images; None if it was not evaluated."""
    held_accuracy: float | None
    """The same of w."""
    uplink_bytes: int
    downlink_bytes: int
    """For training and for evaluation."""
    dense_bytes: int
    """Both directions without compression."""


def federate(training: Training, method: Method) -> Iterator[FederatedRound]:
    """Train with one method, and yield every round as it ends."""
    model = training.initial_model()
    x = parameters(model)
    dense = 4 * sum(weight.numel() for weight in x.values())
    workers = Workers(training)
    update = _local_updates(model, training, workers)
    server = Receiver(method.uplink, x)
    senders: dict[int, Sender] = {}
    downlink = Downlink(method, dense)
    sampler = torch.Generator().manual_seed(training.seed)
    test = training.dataset.test_images, training.dataset.test_labels

    def sample() -> list[int]:
        order = torch.randperm(len(workers.sizes), generator=sampler)
        return sorted(order[: training.sampled()].tolist())

    for number in range(1, training.rounds + 1):
        sampled, sent = sample(), 0
        received = downlink.deliver(x, sampled)
        starts = {n: w.expand(len(sampled), *w.shape).clone() for n, w in downlink.held(x).items()}
        for i, client in enumerate(sampled):
            if method.residual == "model" and client in senders:
                for name, residual in residuals(senders[client]).items():
                    starts[name][i] -= training.lr * residual
        updates = update(starts, sampled)
        total = sum(workers.sizes[client] for client in sampled)
        mean = {name: torch.zeros_like(weight) for name, weight in x.items()}
        for i, client in enumerate(sampled):
            sender = senders.setdefault(client, Sender(method.uplink, seed=client))
            message = sender.compress({name: u[i] for name, u in updates.items()})
            sent += message.numel()
            server.accumulate(client, message, mean, workers.sizes[client] / total)
        x = {name: weight - training.lr * mean[name] for name, weight in x.items()}
        evaluating = sample()
        received += downlink.deliver(x, evaluating)
        accuracy = held = None
        if training.evaluated(number):
            accuracy, _ = evaluate(model, x, *test)
            held = accuracy
            if method.downlink is not None:
                held, _ = evaluate(model, downlink.held(x), *test)
        count = 2 * len(sampled) + len(evaluating)
        yield FederatedRound(number, accuracy, held, sent, received, count * dense)


class Downlink:
    """The models that clients hold."""

    def __init__(self, method: Method, dense: int) -> None:
        self._dense = dense
        self._publisher = None
        if method.downlink is not None:
            self._publisher = Publisher(method.downlink, first=method.first)
        self._versions: dict[int, bytes] = {}

    def held(self, x: Parameters) -> Parameters:
        """Return w."""
        return x if self._publisher is None else self._publisher.model

    def deliver(self, x: Parameters, clients: list[int]) -> int:
        """Bring clients up to date, and return the bytes that are sent to them."""
        if self._publisher is None:
            return self._dense * len(clients)
        self._publisher.publish(x)
        size = 0
        for client in clients:
            update = self._publisher.update(self._versions.get(client))
            size += HEAD + LENGTH * len(update.messages)
            if isinstance(update, Whole):
                size += self._publisher.whole_bytes()
            else:
                size += sum(message.numel() for message in update.messages)
            self._versions[client] = self._publisher.version
        return size


def residuals(sender: Sender) -> dict[str, Tensor]:
    """Return what a client has not sent, by name."""
    states = {name: entry["state"] for name, entry in sender.state_dict()["tensors"].items()}
    return {name: state["residual"] for name, state in states.items() if "residual" in state}


def _local_updates(
    model: nn.Module, training: Training, workers: Workers
) -> Callable[[Parameters, list[int]], Parameters]:
    """Return a function from the clients' models, stacked, to the sums of their gradients."""

    def loss(weights: Parameters, images: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        logits = functional_call(model, weights, (images,))
        return nn.functional.cross_entropy(logits, labels, reduction="none").mul(share).sum()

    gradient = vmap(grad(loss))

    def updates(starts: Parameters, sampled: list[int]) -> Parameters:
        local, total = starts, {name: torch.zeros_like(w) for name, w in starts.items()}
        for _ in range(training.local_steps):
            grads = gradient(local, *workers.next_batch(sampled))
            local = {name: w - training.lr * grads[name] for name, w in local.items()}
            for name, g in grads.items():
                total[name] += g
        return total

    return updates
