# Tensors are DLPack capsules or objects with __dlpack__. Shapes: csrc/row_ops.hpp, checks:
# csrc/row_bindings.cpp.
from collections.abc import Sequence

__version__: str

def cpu_features() -> dict[str, bool]: ...
def cuda_built() -> bool: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
def residual_norm_forward(
    x: object,
    y: object | None,
    gate: object | None,
    scale: object | None,
    shift: object | None,
    weight: object | None,
    bias: object | None,
    r: object | None,
    n: object,
    mean: object,
    rstd: object,
    eps: float,
    tokens_per_frame: int,
    first_token: int,
    threads: int,
    /,
) -> None: ...
def residual_norm_backward(
    dr: object | None,
    dn: object,
    r: object,
    y: object | None,
    gate: object | None,
    scale: object | None,
    weight: object | None,
    mean: object,
    rstd: object,
    dx: object,
    dy: object | None,
    dgate: object | None,
    dscale: object | None,
    dshift: object | None,
    dweight: object | None,
    dbias: object | None,
    tokens_per_frame: int,
    first_token: int,
    threads: int,
    /,
) -> None: ...
def gated_residual_forward(
    x: object, y: object, gate: object | None, r: object, tokens_per_frame: int, first_token: int, threads: int, /
) -> None: ...
def gated_residual_backward(
    dr: object,
    y: object | None,
    gate: object | None,
    dy: object,
    dgate: object | None,
    tokens_per_frame: int,
    first_token: int,
    threads: int,
    /,
) -> None: ...
def rms_norm_forward(x: object, weight: object, n: object, rstd: object, eps: float, threads: int, /) -> None: ...
def rms_norm_backward(
    dn: object, x: object, weight: object, rstd: object, dx: object, dweight: object | None, threads: int, /
) -> None: ...
def qk_rope_forward(
    q: object,
    k: object,
    weight_q: object,
    weight_k: object,
    cos: object,
    sin: object,
    q_out: object,
    k_out: object,
    rstd_q: object,
    rstd_k: object,
    frames: int,
    height: int,
    width: int,
    first_token: int,
    eps: float,
    threads: int,
    /,
) -> None: ...
def qk_rope_backward(
    dq: object,
    dk: object,
    q: object,
    k: object,
    weight_q: object,
    weight_k: object,
    cos: object,
    sin: object,
    rstd_q: object,
    rstd_k: object,
    dq_in: object,
    dk_in: object,
    dweight_q: object | None,
    dweight_k: object | None,
    frames: int,
    height: int,
    width: int,
    first_token: int,
    threads: int,
    /,
) -> None: ...
def guided_euler_step(
    x: object, v: object, v_neg: object | None, dsigma: object, out: object, guidance: float, threads: int, /
) -> None: ...
def gelu(x: object, out: object, threads: int, /) -> None: ...
def gelu_backward(dy: object, x: object, dx: object, threads: int, /) -> None: ...
def linear_rows(x: object, weight: object, bias: object | None, out: object, threads: int, /) -> None: ...
def vae_act(
    y: object,
    gamma: object | None,
    x: object | None,
    bias: object | None,
    r: object | None,
    out: object | None,
    silu: bool,
    upsampled: bool,
    threads: int,
    /,
) -> None: ...

# Shapes: csrc/vae_tiling.hpp, checks: csrc/vae_tiling_bindings.cpp. Tensors are on the CPU, or all
# on one CUDA device with `stream` a cudaStream_t. Pairs are (height, width).
def blend_box(
    out: object,
    tiles: Sequence[tuple[object, int, int]],
    at: tuple[int, int],
    picture: tuple[int, int],
    borders: tuple[int, int],
    clamp: bool,
    round: bool,
    threads: int,
    stream: int,
    /,
) -> None: ...
