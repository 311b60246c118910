"""Whether autocast is on: asked by every layer, in a form that torch.compile can trace in all torch versions we run on."""

from __future__ import annotations

import torch


def autocasting(device_type: str) -> bool:
    """True inside torch.autocast for this type of device; meta tensors have none. (torch.amp.is_autocast_available breaks graphs in torch 2.11.)"""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)
