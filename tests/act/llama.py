"""A Llama with ReLU in its feed-forward, small enough for a test."""

from __future__ import annotations

from typing import Any

import torch


def small_llama() -> Any:
    """Return a ``LlamaForCausalLM`` of two layers with 24 neurons each and random weights, in evaluation mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, hidden_act="relu",
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()
