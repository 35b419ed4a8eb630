"""Telling weights and models apart: digests over names, shapes and numbers, whatever dtype they were loaded in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from patchkit.model.weights import Site, loaded, read_weight

_CHUNK = 1 << 21


def tensor_digest(name: str, tensor: Tensor) -> str:
    """sha256 over name, dtype, shape and bytes, the same whatever dtype the weights were loaded in.

    A bf16 checkpoint loaded in float32 holds the same numbers; so they are hashed in the first of bfloat16, float16,
    float32 and their own dtype that holds them exactly.
    """
    chunks = tensor.detach().cpu().contiguous().view(-1).split(_CHUNK)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, tensor.dtype):
        if dtype == tensor.dtype or all(torch.equal(chunk.to(dtype).to(tensor.dtype), chunk) for chunk in chunks):
            break
    digest = hashlib.sha256(f"{name}|{str(dtype).removeprefix('torch.')}|{list(tensor.shape)}|".encode())
    for chunk in chunks:  # a second tensor as large as the first would be too much where merging counts them
        digest.update(chunk.to(dtype).view(torch.uint8).numpy().data if chunk.numel() else b"")
    return digest.hexdigest()


def model_digest(named: Iterable[tuple[str, Tensor | Callable[[], Tensor]]]) -> str:
    """One sha256 over the digests of many tensors, or of what gives them, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        digest.update(tensor_digest(name, tensor if isinstance(tensor, Tensor) else tensor()).encode())
    return digest.hexdigest()


def weight_digest(site: Site, name: str) -> str:
    """Digest of a site's weight as it is stored, under its on-disk name."""
    if site.experts is not None and site.expert is not None:
        return tensor_digest(name, site.experts.stored(site.expert))
    return tensor_digest(name, read_weight(site) if site.experts else loaded(site.module, "weight"))
