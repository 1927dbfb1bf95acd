"""Loss and gradients of a tiny CLIP on eight pairs, a share in each process; under torchrun they go to FILE."""

import os
import sys

import torch

from dalle_pytorch.clip.trainable import CLIP


def contrast_gradients(rank: int, processes: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The mean loss of all processes, and the mean of their gradients."""
    torch.manual_seed(0)
    clip = CLIP(
        dim_text=16, dim_image=16, dim_latent=8, num_text_tokens=20, text_enc_depth=1, text_seq_len=6, text_heads=2,
        visual_enc_depth=1, visual_heads=2, visual_image_size=16, visual_patch_size=8,
    )  # fmt: skip
    text, images = torch.randint(1, 20, (8, 6)), torch.rand(8, 3, 16, 16)
    negatives = torch.randint(1, 20, (8, 1, 6))
    share = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
    contrast = clip.contrast(text[share], images[share], text[share] != 0, negatives[share], all_processes=True)
    loss = contrast.loss()
    loss.backward()
    results = {name: parameter.grad for name, parameter in clip.named_parameters()}
    for tensor in (loss.data, *results.values()):
        if processes > 1:
            torch.distributed.all_reduce(tensor)
        tensor /= processes
    return loss.detach(), results


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    result = contrast_gradients(rank, torch.distributed.get_world_size())
    if rank == 0:
        torch.save(result, sys.argv[1])
    torch.distributed.barrier()
    os._exit(0)  # as helpers.leave_group does, which is not within reach of a script
