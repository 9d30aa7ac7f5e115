"""IBQ vision tokenizer: `load_vision_tokenizer(folder)` gives numpy images to codes and back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.vision_tokenizer.wrapper import VisionTokenizer, load_vision_tokenizer

__all__ = ["VisionTokenizer", "load_vision_tokenizer"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; configs in this package are read by commands that never need it.
    if name in __all__:
        from model.vision_tokenizer import wrapper

        return getattr(wrapper, name)
    raise AttributeError(name)
