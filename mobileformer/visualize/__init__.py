"""Where a network looks: its attention maps as arrays, as a picture and as a page.

`attention_maps` needs torch alone, `write_page` numpy and Pillow too, `draw_attention` also matplotlib, which
`pip install 'mobileformer[plot]'` brings.
"""

from __future__ import annotations

from mobileformer.visualize.attention import (
    PATH,
    BlockAttention,
    attention_maps,
    former_to_mobile_attention,
    mobile_to_former_attention,
    token_similarity,
)
from mobileformer.visualize.figures import draw_attention
from mobileformer.visualize.page import write_page

__all__ = [
    "PATH",
    "BlockAttention",
    "attention_maps",
    "draw_attention",
    "former_to_mobile_attention",
    "mobile_to_former_attention",
    "token_similarity",
    "write_page",
]
