"""Fused kernels for Mobile-Former: five operators, each with a reference, C++ kernels and gradients.

Knows nothing of the model. Importing this loads no compiled library; the first call that can use one does.
"""

from mf_kernels import _flops, reference
from mf_kernels._flops import fvcore_handles
from mf_kernels._registry import KernelFallbackWarning, KernelRecord, record_kernels, requested_backend, use_backend
from mf_kernels._status import status
from mf_kernels.ops.batch_norm_activation import batch_norm_activation
from mf_kernels.ops.depthwise_conv2d import depthwise_conv2d
from mf_kernels.ops.depthwise_dynamic_relu import depthwise_dynamic_relu
from mf_kernels.ops.dynamic_relu import dynamic_relu, dynamic_relu_
from mf_kernels.ops.fold_batch_norm import fold_batch_norm
from mf_kernels.ops.former_to_mobile import former_to_mobile, former_to_mobile_
from mf_kernels.ops.mobile_to_former import mobile_to_former
from mf_kernels.ops.spatial_dynamic_relu import spatial_dynamic_relu, spatial_dynamic_relu_
from mf_kernels.ops.token_side import TokenSideLayers, token_side

__all__ = [
    "KernelFallbackWarning",
    "KernelRecord",
    "TokenSideLayers",
    "batch_norm_activation",
    "depthwise_conv2d",
    "depthwise_dynamic_relu",
    "dynamic_relu",
    "dynamic_relu_",
    "fold_batch_norm",
    "former_to_mobile",
    "former_to_mobile_",
    "fvcore_handles",
    "mobile_to_former",
    "record_kernels",
    "reference",
    "requested_backend",
    "spatial_dynamic_relu",
    "spatial_dynamic_relu_",
    "status",
    "token_side",
    "use_backend",
]

_flops.register()
