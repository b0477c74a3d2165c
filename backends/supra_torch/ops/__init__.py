"""The operators: for each a dense reference, a chunked form, and a dispatcher."""

from supra_torch.ops.linear_attention import document_numbers, linear_attention
from supra_torch.ops.losses import linear_cross_entropy, linear_kl_divergence
from supra_torch.ops.rotation import rotated
from supra_torch.ops.windowed_attention import WindowState, windowed_attention

__all__ = [
    "WindowState",
    "document_numbers",
    "linear_attention",
    "linear_cross_entropy",
    "linear_kl_divergence",
    "rotated",
    "windowed_attention",
]
