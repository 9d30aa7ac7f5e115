"""Where the codes of a tokenizer in training are put: on latents of training images."""

from __future__ import annotations

from collections.abc import Callable

import torch

from model.vision_tokenizer.ibq import IBQ
from model.vision_tokenizer.initialization import flat_latents
from model.vision_tokenizer.wrapper import to_model_range
from training.contracts.batches import Ranks
from training.tokenizers.image_data import ImageSource
from training.tokenizers.image_stream import StreamingImageSource

CALIBRATION_BATCHES = 30  # batches whose latents the codes are put on


@torch.no_grad()
def place_codes(
    model: IBQ,
    images: ImageSource | StreamingImageSource,
    global_batch_size: int,
    ranks: Ranks,
    place: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Give the model the codes float32 [n_embed, embed_dim] that `place` makes of latents [N, embed_dim]; bool [n_embed]: which changed.

    Latents are those of the first batches' images, in their order, whichever replica encodes them. One rank places.
    """
    width, weight = model.config.embed_dim, model.quantize.embedding.weight
    latents: list[torch.Tensor] = []
    for index in range(CALIBRATION_BATCHES):
        batches = images.batch(index * global_batch_size)
        own = torch.cat([flat_latents(model, to_model_range(one).to(weight.device)).cpu() for one in batches])
        latents += [tensor_of(payload, width) for payload in ranks.gather(own.numpy().tobytes())]
    codes = place(torch.cat(latents)) if ranks.rank == 0 else torch.empty(0, width)
    codes = tensor_of(ranks.gather(codes.numpy().tobytes())[0], width).to(weight.device)
    changed = (codes != weight).any(dim=1)
    weight.copy_(codes)
    return changed


def tensor_of(payload: bytes, width: int) -> torch.Tensor:
    """float32 [n, width] from its bytes."""
    return torch.frombuffer(bytearray(payload), dtype=torch.float32).reshape(-1, width)
