"""Which backend is chosen: every row of the table, on made-up devices, packages and behaviour."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from pusa_fast import attention as public
from pusa_fast.attention import BACKENDS, ORDER, attention, backends, resolve, table
from pusa_fast.attention.flash import PACKAGES
from pusa_fast.testing import make_input

CPU = torch.device("cpu")
LIBRARIES = ("cudnn", "fa2", "fa3", "fa4", "sage")
CACHED = (table.architecture, table._installed, table._tried, table._chosen, table._warn_once)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """What is remembered about a device and its packages is not what other tests are to see."""
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


class Machine:
    """A GPU of this architecture with these libraries, as far as the table can tell.

    `tried`: the examples that were run.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, major: int, libraries: tuple[str, ...] = LIBRARIES) -> None:
        self.libraries, self.tried = set(libraries), []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: "cudnn" in self.libraries)
        monkeypatch.setattr(table, "_apart", self.apart)
        monkeypatch.setattr(table, "_tried", self.run)

    def apart(self, load: Any) -> None:
        """Stands for the import: `load` is the bound method of a package."""
        (name,) = (name for name, package in PACKAGES.items() if package.load == load)
        if name not in self.libraries:
            raise ModuleNotFoundError(f"No module named {PACKAGES[name].modules[0]!r}", name=PACKAGES[name].modules[0])

    def run(self, name: str, device: torch.device, *inputs: Any) -> None:
        self.tried.append((name, *inputs))


def on_gpu(backend: str = "auto", dtype: torch.dtype = torch.bfloat16, head_dim: int = 128, grad: bool = False) -> str:
    return resolve(backend, "cuda", dtype, head_dim, grad)


def test_the_table_names_what_there_is() -> None:
    assert list(BACKENDS) == ["sdpa", "cudnn", "fa2", "fa3", "fa4", "sage"]
    assert ORDER == {8: ("fa2", "sdpa"), 9: ("fa4", "fa3", "cudnn", "fa2", "sdpa"), 10: ("fa4", "cudnn", "sdpa")}
    assert [name for name, backend in BACKENDS.items() if not backend.exact] == ["sage"]
    assert all(BACKENDS[name].exact for row in ORDER.values() for name in row)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("major", "name"), [(major, name) for major, row in ORDER.items() for name in row])
def test_auto_takes_the_first_of_its_row_that_is_there(
    monkeypatch: pytest.MonkeyPatch, major: int, name: str, grad: bool
) -> None:
    row = ORDER[major]
    machine = Machine(monkeypatch, major, row[row.index(name) :])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what is not installed is no news
        assert on_gpu(grad=grad) == name
    if name != "sdpa":
        assert machine.tried == [(name, torch.bfloat16, 128, grad)]


@pytest.mark.parametrize("major", [7, 11, 12])
def test_other_architectures_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    Machine(monkeypatch, major)
    assert on_gpu() == "sdpa"


@pytest.mark.parametrize(
    ("major", "inputs", "chosen"),
    [
        (9, {"dtype": torch.float32}, "sdpa"),
        (9, {"dtype": torch.float16}, "fa4"),
        (9, {"head_dim": 256}, "fa4"),
        (9, {"head_dim": 256, "grad": True}, "fa4"),
        (9, {"head_dim": 264}, "sdpa"),
        (9, {"head_dim": 12}, "sdpa"),
        (10, {"head_dim": 256}, "fa4"),
        (10, {"head_dim": 192}, "sdpa"),
        (10, {"dtype": torch.float32}, "sdpa"),
        (8, {"head_dim": 256, "grad": True}, "fa2"),
        (8, {"head_dim": 100}, "sdpa"),
        (8, {"dtype": torch.float32}, "sdpa"),
    ],
    ids=str,
)
def test_dtype_and_head_dimension_decide(
    monkeypatch: pytest.MonkeyPatch, major: int, inputs: dict[str, Any], chosen: str
) -> None:
    Machine(monkeypatch, major)
    assert on_gpu(**inputs) == chosen


def test_cudnn_is_passed_over_for_wide_heads_and_where_it_may_not_be_random(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 9, ("cudnn", "fa2"))
    assert [on_gpu(head_dim=dim) for dim in (128, 136)] == ["cudnn", "fa2"]
    torch.use_deterministic_algorithms(True)
    try:
        assert on_gpu() == "fa2"
        with pytest.raises(ValueError, match="'cudnn' cannot be used: it is not deterministic"):
            on_gpu("cudnn")
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_choice_asks_whether_gradients_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Ampere FA4 has a forward and no backward: the tensors decide, and torch.no_grad."""
    Machine(monkeypatch, 8)
    ran: list[str] = []
    backend = BACKENDS["fa4"]
    monkeypatch.setattr(public, "BACKENDS", {"fa4": table.Backend(lambda q, k, v: ran.append("fa4"))})
    monkeypatch.setattr(table, "architecture", lambda device: 8)
    q = make_input(1, 4, 1, 64, dtype=torch.bfloat16)
    attention(q, q, q, "fa4")
    for which in range(3):
        qkv = [q, q, q]
        qkv[which] = q.clone().requires_grad_()
        with pytest.raises(ValueError, match="'fa4' cannot be used: it has no backward for sm_8x"):
            attention(*qkv, "fa4")
        with torch.no_grad():
            attention(*qkv, "fa4")
    assert len(ran) == 4 and backend.backward is not None and 8 not in backend.backward


@pytest.mark.parametrize("major", [8, 9, 10])
def test_sage_runs_by_name_alone_and_forward_only(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    Machine(monkeypatch, major, ("sage",))
    assert on_gpu() == "sdpa"
    assert on_gpu("sage") == "sage"
    with pytest.raises(ValueError, match="'sage' cannot be used: it has no backward"):
        on_gpu("sage", grad=True)
    with pytest.raises(ValueError, match="takes head dimensions 64, 96, 128, got 72"):
        on_gpu("sage", head_dim=72)


@pytest.mark.parametrize(
    ("backend", "inputs", "message"),
    [
        ("flash", {}, "'flash' does not exist: choose one of auto, sdpa, cudnn, fa2, fa3, fa4, sage"),
        ("fa3", {"dtype": torch.float32}, r"takes float16 and bfloat16, got torch\.float32: use sdpa"),
        ("fa3", {"head_dim": 12}, "head dimensions 8 to 256 in steps of 8, got 12: use sdpa"),
        ("fa2", {}, r"flash_attn\.flash_attn_interface is not installed: pip install flash-attn"),
        ("cudnn", {}, "this torch has no cuDNN"),
    ],
    ids=str,
)
def test_a_name_that_cannot_be_used_says_why_and_how_to_mend_it(
    monkeypatch: pytest.MonkeyPatch, backend: str, inputs: dict[str, Any], message: str
) -> None:
    Machine(monkeypatch, 9, ("fa3",))
    with pytest.raises(ValueError, match=message):
        on_gpu(backend, **inputs)


def test_without_a_gpu_there_is_sdpa_and_the_others_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = backends()
    assert list(report) == list(BACKENDS) and report.pop("sdpa") is None
    assert all("runs on CUDA devices, not on cpu" in str(reason) for reason in report.values())
    assert resolve() == resolve("sdpa") == "sdpa"
    q = make_input(1, 2, 1, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="'fa3' cannot be used: it runs on CUDA devices, not on cpu"):
        attention(q, q, q, backend="fa3")


def test_devices_that_do_not_exist_are_nobodys_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 9)
    assert resolve("auto", "cuda:1") == "sdpa"  # whoever loads a model there says that it does not exist
    with pytest.raises(ValueError, match="unknown device 'gpu'"):
        resolve("auto", "gpu")


def test_rocm_is_no_cuda_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, 9)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert on_gpu() == "sdpa"


def test_backends_reports_for_the_device_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 10, ("fa4", "sage"))
    report = backends()
    assert report["sdpa"] is report["fa4"] is report["sage"] is None
    assert report["fa3"] == "it has no kernel for sm_10x, cuda: use auto"
    assert "not installed" in str(report["fa2"]) and "no cuDNN" in str(report["cudnn"])
    assert machine.tried == [("fa4", torch.bfloat16, 128, False), ("sage", torch.bfloat16, 128, False)]


# What follows imports and runs for real: stand-ins for the packages, on CPU tensors that the
# table takes for a Hopper's.


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "architecture", lambda device: 9)
    for package in PACKAGES.values():  # whatever this machine has installed
        for path in package.modules:
            monkeypatch.setitem(sys.modules, path, None)


def install(monkeypatch: pytest.MonkeyPatch, name: str, module: Any) -> None:
    for path in PACKAGES[name].modules:
        monkeypatch.setitem(sys.modules, path, module)


def fa4(forward: Any, backward: Any = None) -> ModuleType:
    module = ModuleType("fa4")
    module._flash_attn_fwd, module._flash_attn_bwd = forward, backward  # type: ignore[attr-defined]
    return module


def forward(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, return_lse: bool) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("blhk,bmhk->bhlm", q, k).float() * softmax_scale
    return torch.einsum("bhlm,bmhk->blhk", scores.softmax(-1).to(v.dtype), v), scores.logsumexp(-1)


def backward(q: Tensor, *others: Any, dq: Tensor, dk: Tensor, dv: Tensor, **options: Any) -> None:
    for grad in (dq, dk, dv):
        grad.fill_(1)


def no_kernel(*args: Any, **options: Any) -> None:
    raise RuntimeError("no kernel image\nat line 1")


class Broken(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"module has no attribute {name!r}")


class Missing:
    """A module that imports one that is not there."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "flash_attn_interface":
            raise ModuleNotFoundError("No module named 'flash_attn_3'", name="flash_attn_3")


def chosen(backend: str = "auto", grad: bool = False) -> str:
    return resolve(backend, CPU, torch.bfloat16, 64, grad)


def test_a_package_that_works_is_taken(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    install(monkeypatch, "fa4", fa4(forward, backward))
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == chosen(grad=True) == chosen("fa4") == "fa4"
    assert torch.equal(state, torch.random.get_rng_state())
    q, k, v = make_input(1, 6, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
    assert torch.equal(attention(q, k, v), forward(q, k, v, 64**-0.5, True)[0])


def about(name: str, record: pytest.WarningsRecorder) -> list[str]:
    """Warnings that `auto` passes over a backend. A CUDA build of torch without a driver passes
    over its own cuDNN as well."""
    return [text for w in record if (text := str(w.message)).startswith(f"attention: auto passes over {name}:")]


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (fa4(no_kernel), r"is installed but fails \(RuntimeError: no kernel image\): for torch"),
        (Broken("fa4"), "is installed but fails .*has no attribute '_flash_attn_fwd'"),
        (fa4(lambda q: q), "is installed but fails .*unexpected keyword argument|is installed but fails .*positional"),
        (fa4(lambda q, *_, **__: (q * torch.nan, q[..., 0])), "is installed but fails .*not finite"),
    ],
    ids=["raises", "has other names", "has another signature", "returns NaN"],
)
def test_a_broken_package_is_warned_about_once_and_passed_over(
    monkeypatch: pytest.MonkeyPatch, hopper: None, module: ModuleType, message: str
) -> None:
    install(monkeypatch, "fa4", module)
    with pytest.warns(UserWarning, match=f"auto passes over fa4: flash_attn.cute.interface {message}") as record:
        assert chosen() == "sdpa"
        assert resolve("auto", CPU, torch.bfloat16, 64) == resolve("auto", CPU, torch.bfloat16, 64) == "sdpa"
    assert len(about("fa4", record)) == 1
    with pytest.raises(ValueError, match=f"'fa4' cannot be used: .*{message}"):
        chosen("fa4")


def test_the_warning_is_not_repeated_for_other_inputs(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    install(monkeypatch, "fa4", fa4(no_kernel))
    with pytest.warns(UserWarning) as record:
        for head_dim in (64, 128):
            assert resolve("auto", CPU, torch.bfloat16, head_dim) == "sdpa"
    assert len(about("fa4", record)) == 1


def test_a_backward_that_fails_is_found_before_it_is_needed(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    install(monkeypatch, "fa4", fa4(forward, no_kernel))
    assert chosen() == "fa4"
    with pytest.warns(UserWarning, match="no kernel image"):
        assert chosen(grad=True) == "sdpa"


def test_a_package_whose_own_imports_fail_is_broken_not_absent(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.warns(UserWarning, match=r"auto passes over fa3: flash_attn_interface is installed but does not load"):
        assert chosen() == "sdpa"
    with pytest.raises(ValueError, match=r"No module named 'flash_attn_3'.*build the folder hopper"):
        chosen("fa3")


def test_the_example_runs_outside_of_the_callers_modes(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    install(monkeypatch, "fa4", fa4(forward, backward))
    with FakeTensorMode(), torch.inference_mode():
        assert chosen(grad=True) == "fa4"


def test_the_choice_is_made_while_torch_compile_traces(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    install(monkeypatch, "fa4", fa4(forward, backward))
    q, k, v = make_input(1, 6, 3, 2, 64, dtype=torch.bfloat16).unbind(2)
    out = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.equal(out, forward(q, k, v, 64**-0.5, True)[0])


def test_cudnn_leaves_a_single_key_to_torch(monkeypatch: pytest.MonkeyPatch, hopper: None) -> None:
    q, k = make_input(1, 6, 2, 64), make_input(1, 1, 2, 64)
    torch.testing.assert_close(BACKENDS["cudnn"].run(q, k, k), k.expand_as(q))
    with pytest.raises(
        RuntimeError, match=r"[Nn]o.*kernel"
    ):  # a CPU has no cuDNN: the request is not answered by another
        BACKENDS["cudnn"].run(q, q, q)
