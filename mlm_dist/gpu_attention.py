"""Attention on a GPU that computes nothing across documents: FlashAttention over a micro-batch's rows, end to end."""

import importlib.util
import logging

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

logger = logging.getLogger(__name__)

WIDEST_HEAD, HEAD_MULTIPLE = 256, 8  # that the kernels take


def usable(x: Tensor, head_width: int) -> bool:
    """Whether the kernels take x, hidden states or weights: fp16 or bf16 on a GPU, and heads of such a width."""
    in_half = x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16)
    return in_half and head_width <= WIDEST_HEAD and head_width % HEAD_MULTIPLE == 0


def most_documents(starts: Tensor, max_documents: int) -> int:
    """How many documents, and padding, a micro-batch may hold; starts (B, T), max_documents of a row on average."""
    rows, length = starts.shape
    return rows * min(max_documents, length)


def too_many(starts: Tensor, max_documents: int) -> str | None:
    """What is wrong with a micro-batch that holds more documents than it may; None where it doesn't.

    starts: (B, T), on the host: True where a document, or padding, begins
    """
    found, most = int(starts.sum()), most_documents(starts, max_documents)
    if found <= most:
        return None
    return (
        f"a micro-batch of {len(starts)} rows holds {found} documents, and model.encoder.max_documents = "
        f"{max_documents} allows {most}; set it to {2 * -(-found // len(starts))}"
    )


def sequence_bounds(starts: Tensor, most: int) -> Tensor:
    """Where the documents of a flattened batch begin and end, int32 (most + 1,): 0, ..., B * T, B * T, B * T.

    starts: (B, T). A fixed shape keeps the step static and free of host syncs; the surplus are sequences of length 0.
    More than `most` documents stop the program: `too_many` tells of them before.
    """
    begins = starts.flatten()
    number = begins.cumsum(0) - 1
    torch._assert_async(number[-1] < most, "more documents in a micro-batch than model.encoder.max_documents allows")
    total = begins.numel()
    index = torch.arange(total, device=starts.device, dtype=torch.int32)
    bounds = torch.full((most + 1,), total, device=starts.device, dtype=torch.int32)
    # what begins no document writes `total` to the last place, which holds it already
    return bounds.scatter_(0, torch.where(begins, number, most), torch.where(begins, index, total))


def attend(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, half_window: int) -> Tensor:
    """Attention that computes nothing across documents; CUDA, fp16 or bf16. q, k, v: (B, T, H, D) -> (B, T, H * D).

    Only what torch's varlen_attn has had from 2.11 on: window_size took the place of is_causal there.
    """
    length = q.shape[1]
    window = (half_window, half_window) if half_window < length - 1 else (-1, -1)
    flat = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, H, D)
    return varlen_attn(*flat, bounds, bounds, length, length, window_size=window).view(*q.shape[:2], -1)


def use_flash_attention_3(device: torch.device) -> bool:
    """Have attention on the GPU done by FlashAttention-3 (Shah et al., arXiv 2407.08608) from here on, where it can be.

    That is on Hopper (compute capability 9), where its package, flash_attn_interface, is installed; elsewhere torch's
    own kernels, FlashAttention-2, stay. Returns whether it does it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except Exception as error:  # whatever a package that was built for another torch or CUDA raises when it's loaded
        logger.warning("FlashAttention-3 is installed and can't be used (%s): torch's own kernels stay", error)
        return False
    return True
