"""The memory-bound steps of the transformer, the VAE and training as functions, one file to an op
family.

Each checks its arguments, then calls the backend that `registry` chooses. The formulas are in
`pusa_fast.kernels.reference`, under the same names. Triton serves CUDA tensors, native code float32
and bf16 on the CPU, plain torch everything else; `ops.use("reference")` forces one. The first two
run as `torch.ops.pusa_fast.*` under autograd, modes, functorch and torch.compile, which traces them
without graph breaks.
"""

from __future__ import annotations

from pusa_fast.kernels.reference import rope_split
from pusa_fast.ops.flow import flow_loss, noise_and_target
from pusa_fast.ops.fp8 import gelu_quantize_rows, quantize_rows, residual_norm_fp8, scaled_linear
from pusa_fast.ops.linear import gelu, linear, linear_gelu, linear_rows
from pusa_fast.ops.norm import gated_residual, residual_norm, rms_norm
from pusa_fast.ops.registry import BACKENDS, backends, use
from pusa_fast.ops.rope import qk_rope
from pusa_fast.ops.step import guided_euler_step
from pusa_fast.ops.vae import vae_act_

__all__ = [
    "BACKENDS",
    "backends",
    "flow_loss",
    "gated_residual",
    "gelu",
    "gelu_quantize_rows",
    "guided_euler_step",
    "linear",
    "linear_gelu",
    "linear_rows",
    "noise_and_target",
    "qk_rope",
    "quantize_rows",
    "residual_norm",
    "residual_norm_fp8",
    "rms_norm",
    "rope_split",
    "scaled_linear",
    "use",
    "vae_act_",
]
