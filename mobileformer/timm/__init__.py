"""Mobile-Former in timm. Importing this registers the seven sizes; timm has no other door for a package outside of it.

    import mobileformer.timm
    model = timm.create_model("mobileformer_294m", num_classes=10)

`mobileformer_26m` to `mobileformer_508m`, and the same under the published spelling, `mobile_former_26m` to
`mobile_former_508m`. docs/ecosystem.md says what timm can do with them.
"""

from __future__ import annotations

from mobileformer._torchvision import ensure_torchvision

try:
    ensure_torchvision()  # timm imports it
    import timm as _timm  # noqa: F401
except ImportError as error:
    raise ImportError(f"mobileformer.timm needs timm ({error}): pip install 'mobileformer[timm]'") from error

from mobileformer.timm.mobileformer import default_cfgs
from mobileformer.timm.model import MobileFormer, checkpoint_filter_fn

__all__ = ["MobileFormer", "checkpoint_filter_fn", "default_cfgs"]
