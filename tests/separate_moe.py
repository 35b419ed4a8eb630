"""A mixture of experts as older code has it: each expert is a module of its own, in a list that the block loops over.

On disk it has the names of a Qwen3-MoE, whose numbers it computes; `separated` makes it of any whose experts are fused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


class Expert(nn.Module):
    """One of them, a gated feed-forward."""

    def __init__(self, fused: Any, number: int) -> None:
        super().__init__()
        (inner, hidden), like = fused.gate_up_proj.shape[1:], fused.gate_up_proj
        kind: dict[str, Any] = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.gate_proj = nn.Linear(hidden, inner // 2, **kind)
        self.up_proj = nn.Linear(hidden, inner // 2, **kind)
        self.down_proj = nn.Linear(inner // 2, hidden, **kind)
        self.act_fn = fused.act_fn
        with torch.no_grad():
            opened, amount = fused.gate_up_proj[number].chunk(2)
            for linear, weight in (
                (self.gate_proj, opened),
                (self.up_proj, amount),
                (self.down_proj, fused.down_proj[number]),
            ):
                linear.weight.copy_(weight)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.down_proj(self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden))
        return found


class CalledList(nn.ModuleList):
    """A list that is called itself, in the place of a fused module."""

    def forward(self, hidden_states: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        output = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            choice, token = torch.where((index == number).T)
            if len(token):
                gated = expert(hidden_states[token]) * gates[token, choice, None]
                output.index_add_(0, token, gated.to(output))
        return output


class Block(nn.Module):
    """A router and a list of experts."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.gate = fused.gate
        self.experts = nn.ModuleList([Expert(fused.experts, number) for number in range(fused.experts.num_experts)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        flat = hidden_states.flatten(0, 1)  # (tokens, hidden)
        _, gates, index = self.gate(flat)
        output = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(index == number)
            if len(token):
                output.index_add_(0, token, expert(flat[token]) * gates[token, choice, None])
        return output.view_as(hidden_states)


def separated(model: PreTrainedModel, called: bool = False) -> PreTrainedModel:
    """The model with its fused experts taken apart: in blocks that loop over them, or in lists that are called."""
    for layer in model.model.layers:
        if not hasattr(layer.mlp, "experts"):
            continue
        if called:
            fused = layer.mlp.experts
            layer.mlp.experts = CalledList([Expert(fused, number) for number in range(fused.num_experts)])
        else:
            layer.mlp = Block(layer.mlp)
    return model


class SeparateMoeConfig(Qwen3MoeConfig):
    """Of the class below."""

    model_type = "separate_moe"


class SeparateMoeForCausalLM(Qwen3MoeForCausalLM):
    """A Qwen3-MoE with separate experts."""

    config_class = SeparateMoeConfig

    def __init__(self, config: SeparateMoeConfig) -> None:
        super().__init__(config)
        separated(self)


AutoConfig.register(SeparateMoeConfig.model_type, SeparateMoeConfig)
AutoModelForCausalLM.register(SeparateMoeConfig, SeparateMoeForCausalLM)
