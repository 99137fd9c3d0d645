"""Every Triton launcher by the name that `pusa_fast.ops` calls, as native launchers are named."""

from pusa_fast.kernels.flow import flow_loss_backward, flow_loss_forward, noise_and_target
from pusa_fast.kernels.fp8 import gelu_quantize_rows, quantize_rows
from pusa_fast.kernels.norm import rms_norm_backward, rms_norm_forward
from pusa_fast.kernels.qk_rope import qk_rope_backward, qk_rope_forward
from pusa_fast.kernels.residual_norm import (
    gated_residual_backward,
    gated_residual_forward,
    residual_norm_backward,
    residual_norm_forward,
    residual_norm_fp8_forward,
)
from pusa_fast.kernels.step import guided_euler_step
from pusa_fast.kernels.vae_act import vae_act_

__all__ = [
    "flow_loss_backward",
    "flow_loss_forward",
    "gated_residual_backward",
    "gated_residual_forward",
    "gelu_quantize_rows",
    "guided_euler_step",
    "noise_and_target",
    "qk_rope_backward",
    "qk_rope_forward",
    "quantize_rows",
    "residual_norm_backward",
    "residual_norm_forward",
    "residual_norm_fp8_forward",
    "rms_norm_backward",
    "rms_norm_forward",
    "vae_act_",
]
