"""Adapters of a small GPT-2, trained on a language that the model does not know."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.common.data import Dataset

__all__ = ["MISSING", "MODELS", "adapted", "is_available", "language"]

# Models by name, and the rank of their adapters.
MODELS = {"lora-4": 4, "lora-8": 8}
MISSING = "the setting `lora` needs peft and transformers: pip install peft 'transformers>=4.46'"
TOKENS = 32
LENGTH = 16
WIDTH = 64
BLOCKS = 2
SEQUENCES = 4096
TEST_SEQUENCES = 512
PRETRAINING_STEPS = 300


def is_available() -> bool:
    """Return whether peft and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("peft", "transformers"))


def sequences(seed: int, count: int, generator: torch.Generator) -> Tensor:
    """Return sequences (count, 17; int64) of a language of `seed`: a Markov chain of 32 tokens."""
    logits = 2.5 * torch.randn(TOKENS, TOKENS, generator=torch.Generator().manual_seed(seed))
    following = logits.softmax(-1)
    tokens = [torch.randint(TOKENS, (count,), generator=generator)]
    for _ in range(LENGTH):
        tokens.append(torch.multinomial(following[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


def language(seed: int) -> Dataset:
    """Return sequences of the language that the adapters learn."""
    generator = torch.Generator().manual_seed(seed)
    train = sequences(seed + 1000, SEQUENCES, generator)
    test = sequences(seed + 1000, TEST_SEQUENCES, generator)
    return Dataset("language", train[:, :-1], train[:, 1:], test[:, :-1], test[:, 1:])


class Adapted(nn.Module):
    """Returns logits of a GPT-2; only its adapters have gradients."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def adapted(rank: int, seed: int) -> Adapted:
    """Return a GPT-2 that was trained on another language, with new adapters of this rank.

    Raises
    ------
    ValueError
        If peft or transformers is not installed.
    """
    if not is_available():
        raise ValueError(MISSING)
    from peft import LoraConfig, get_peft_model

    model = _gpt2()
    model.load_state_dict(_pretrained(seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapters = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        )
        return Adapted(get_peft_model(model, adapters))


def _gpt2() -> nn.Module:
    # Nothing is looked for on the network.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=TOKENS,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=BLOCKS,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    config._attn_implementation = "eager"
    return GPT2LMHeadModel(config)


@functools.lru_cache(maxsize=4)
def _pretrained(seed: int) -> dict[str, Tensor]:
    """Return the weights of a GPT-2 after AdamW on the first language."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Adapted(_gpt2())
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in _batches(seed):
        logits = model(batch[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.model.state_dict()


def _batches(seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    for _ in range(PRETRAINING_STEPS):
        yield sequences(seed, 32, generator)
