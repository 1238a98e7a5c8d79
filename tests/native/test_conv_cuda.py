"""csrc/conv_cuda.cu against the float64 reference: on the CPU by csrc/cuda_shim, on a GPU where there is one."""

from __future__ import annotations

import ctypes
import mmap

import pytest
import torch
from cuda_shim import guarded
from exactness import assert_as_exact
from torch import Tensor

from spark_fast.ops import native_cuda
from spark_fast.ops.conv import cuda, reference
from spark_fast.ops.window import Geometry, Window
from spark_fast.patches import ActivePatches

GRID = (2, 3)
MASKS = {
    "none": lambda: torch.zeros(2, *GRID, dtype=torch.bool),
    "all": lambda: torch.ones(2, *GRID, dtype=torch.bool),
    "one": lambda: torch.tensor([[[0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]).bool(),
    "equal": lambda: torch.tensor([[[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [1, 0, 0]]]).bool(),
    "unequal": lambda: torch.tensor([[[0, 0, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]]).bool(),
    "few": lambda: torch.tensor([[[0, 1, 0], [0, 1, 1]]]).bool(),
}
# side, channels, output channels. Weights that stay in shared memory (up to 64 x 64) and that come in steps; one panel
# of output channels and two; whole slices of 32 channels, parts of them, and several.
SHAPES = [(8, 64, 64), (8, 72, 24), (4, 24, 72), (4, 8, 136), (4, 128, 64), (2, 40, 8), (2, 8, 80), (16, 24, 16)]


class Case:
    """One convolution's tensors on `device`, and the reference's results on the CPU."""

    def __init__(self, active: Tensor, side: int, channels: int, columns: int, dtype: torch.dtype, device: str = "cpu"):
        self.terms = active.sum().item() * side**2, 9 * channels, 9 * columns
        self.geometry = Geometry.of(ActivePatches(active.to(device)), side, cuda.WINDOW)
        self.cpu_geometry = Geometry.of(ActivePatches(active), side, cuda.WINDOW)
        rows = self.cpu_geometry.rows_in
        self.features, self.grad = torch.randn(rows, channels).to(dtype), torch.randn(rows, columns).to(dtype)
        self.weight, self.bias = torch.randn(columns, channels, 3, 3).to(dtype), torch.randn(columns).to(dtype)
        self.device = device

    def to_device(self) -> tuple[Tensor, ...]:
        return tuple(t.to(self.device) for t in (self.features, self.grad, self.weight, self.bias))

    def run(self, with_bias: bool = True) -> tuple[Tensor, ...]:
        """Output and the gradients of input and weight."""
        features, grad, weight, bias = self.to_device()
        return (
            cuda.forward(features, weight, bias if with_bias else None, self.geometry, 1),
            cuda.grad_input(grad, weight, self.geometry, 1),
            cuda.grad_weight(grad, features, self.geometry, 1, weight),
        )

    def check(self, results: tuple[Tensor, ...], with_bias: bool = True) -> None:
        theirs, oracle = self._reference(self.features.dtype, with_bias), self._reference(torch.float64, with_bias)
        terms = dict(zip(("grad_weight", "forward", "grad_input"), self.terms, strict=True))
        for what, ours, other, exact in zip(
            ("forward", "grad_input", "grad_weight"), results, theirs, oracle, strict=True
        ):
            assert ours.is_contiguous() and ours.dtype == self.features.dtype, what
            assert_as_exact(ours.cpu(), other, exact, what, terms[what])

    def _reference(self, dtype: torch.dtype, with_bias: bool) -> tuple[Tensor, ...]:
        x, dy, w, b = (t.to(dtype) for t in (self.features, self.grad, self.weight, self.bias))
        return (
            reference.forward(x, w, b if with_bias else None, self.cpu_geometry, 1),
            reference.grad_input(dy, w, self.cpu_geometry, 1),
            reference.grad_weight(dy, x, self.cpu_geometry, 1, w),
        )


@pytest.mark.parametrize("dtype", cuda.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_reference(device: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    case = Case(MASKS["few" if shape[0] == 16 else "unequal"](), *shape, dtype, device)
    case.check(case.run())


@pytest.mark.parametrize(
    ("side", "mask"), [(side, mask) for side in cuda.SIDES for mask in (MASKS if side < 16 else ("none", "few"))]
)
def test_masks(device: str, side: int, mask: str) -> None:
    case = Case(MASKS[mask](), side, 16, 8, torch.bfloat16, device)
    case.check(case.run(with_bias=False), with_bias=False)


def test_no_images(device: str) -> None:
    geometry = Geometry.of(ActivePatches(torch.zeros(0, *GRID, dtype=torch.bool, device=device)), 4, cuda.WINDOW)
    rows = torch.zeros(0, 8, dtype=torch.bfloat16, device=device)
    weight = torch.randn(8, 8, 3, 3).to(rows)
    assert cuda.forward(rows, weight, weight[0, :, 0, 0], geometry, 1).shape == (0, 8)
    assert cuda.grad_input(rows, weight, geometry, 1).shape == (0, 8)
    assert torch.equal(cuda.grad_weight(rows, rows, geometry, 1, weight), torch.zeros_like(weight))


@pytest.mark.parametrize(("side", "columns", "size"), [(2, 16, (8, 5, 5)), (4, 264, (4, 3, 3))], ids=str)
def test_many_patches(device: str, side: int, columns: int, size: tuple[int, int, int]) -> None:
    """Blocks compute several tiles and panels, the last tile is ragged, images end inside tiles."""
    active = torch.rand(size) < 0.85
    active[2] = False
    case = Case(active, side, 8, columns, torch.float16, device)
    assert case.features.shape[0] > 2 * 128
    case.check(case.run())


def test_tensors_that_are_not_contiguous_or_not_aligned(device: str) -> None:
    case = Case(MASKS["equal"](), 4, 24, 16, torch.bfloat16, device)

    def across(t: Tensor) -> Tensor:
        return t.transpose(0, -1).contiguous().transpose(0, -1)

    def shifted(t: Tensor) -> Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    def negated(t: Tensor) -> Tensor:
        return torch._neg_view(-t)

    def every_other(t: Tensor) -> Tensor:
        return t.repeat_interleave(2, -1)[..., ::2]

    for layout in (across, shifted, negated, every_other):
        features, grad, weight, bias = map(layout, case.to_device())
        results = (
            cuda.forward(features, weight, bias, case.geometry, 1),
            cuda.grad_input(grad, weight, case.geometry, 1),
            cuda.grad_weight(grad, features, case.geometry, 1, weight),
        )
        case.check(results)


@pytest.mark.parametrize("shape", [(8, 40, 72), (4, 64, 16), (2, 8, 16)], ids=str)
def test_the_same_bits_whatever_the_order_of_threads(on_shim, shape: tuple[int, int, int]) -> None:
    active = torch.rand(7, 5, 5) < 0.85 if shape[0] == 2 else MASKS["equal"]()  # several tiles for each block
    case = Case(active, *shape, torch.bfloat16)
    case.check(on_shim.same_in_every_order(case.run))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8, 64, 64), (4, 128, 128), (2, 256, 256)], ids=str)
def test_every_block_at_work_and_the_same_bits_in_every_run(shape: tuple[int, int, int]) -> None:
    if cuda.unavailable():
        pytest.skip(cuda.unavailable())
    case = Case(torch.rand(32, 7, 7) < 0.4, *shape, torch.bfloat16, "cuda")
    first, *others = [case.run() for _ in range(3)]
    case.check(first)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("side", cuda.SIDES)
def test_no_two_rows_of_a_matrix_share_banks(on_shim, side: int) -> None:
    pointer = ctypes.CDLL(on_shim.module.__file__).spark_shim_bank_conflicts
    pointer.restype = ctypes.POINTER(ctypes.c_int64)
    count = pointer().contents
    count.value = 0
    for columns in (16, 72):
        Case(MASKS["one"](), side, 16, columns, torch.bfloat16).run()
    assert count.value == 0


def test_nothing_is_written_outside_the_outputs(on_shim) -> None:
    channels, columns = 8, 24
    case = Case(MASKS["unequal"](), 4, channels, columns, torch.float16)
    module, weight = on_shim.module, case.weight.permute(2, 3, 1, 0).contiguous()
    args = native_cuda.geometry_args(case.geometry)[0]
    parts = module.conv_weight_parts(0, args, channels, columns)
    assert parts > 1
    out, out_intact = guarded(case.grad.shape, torch.float16)
    partial, partial_intact = guarded((parts, 9, channels, columns), torch.float32)
    grad_weight, weight_intact = guarded(case.weight.shape, torch.float16)
    x, dy, w = (t.data_ptr() for t in (case.features, case.grad, weight))
    common = (0, 0, native_cuda.TYPES[torch.float16], args, channels, columns)
    module.conv_gather(*common, False, x, w, case.bias.data_ptr(), out.data_ptr())
    module.conv_weight(*common, x, dy, partial.data_ptr(), parts, grad_weight.data_ptr())
    assert out_intact() and partial_intact() and weight_intact()
    assert not partial.isnan().any()
    case.check((out, case.run()[1], grad_weight))


def test_offsets_beyond_32_bits(on_shim) -> None:
    side, channels = 4, 64
    rows = side * side
    far = 2**31 // (rows * channels)  # patches; only the touched pages of the map take memory
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 1) * rows * channels), dtype=torch.int16).view(torch.bfloat16)
    case = Case(torch.ones(1, 1, 1, dtype=torch.bool), side, channels, 8, torch.bfloat16)
    memory[-rows * channels :] = case.features.flatten()
    table = torch.tensor([far], dtype=torch.int32)
    args = (case.geometry.query.coords.data_ptr(), 1, table.data_ptr(), 1, 1, 1, side, side)
    out, weight = torch.empty(rows, 8, dtype=torch.bfloat16), case.weight.permute(2, 3, 1, 0).contiguous()
    partial, grad_weight = torch.empty(9, channels, 8), torch.empty_like(case.weight)
    x, dy, w, bias = (t.data_ptr() for t in (memory, case.grad, weight, case.bias))
    common = (0, 0, native_cuda.TYPES[torch.bfloat16], args, channels, 8)
    on_shim.module.conv_gather(*common, False, x, w, bias, out.data_ptr())
    on_shim.module.conv_weight(*common, x, dy, partial.data_ptr(), 1, grad_weight.data_ptr())
    case.check((out, case.run()[1], grad_weight))


@pytest.mark.parametrize("shape", [(2, 8, 80), (4, 64, 16), (8, 64, 16)], ids=str)
def test_gpus_with_less_shared_memory(on_shim, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int]) -> None:
    """Narrower panels of columns, and weights that do not stay, where they would not fit."""
    case = Case(MASKS["one"](), *shape, torch.bfloat16)
    cuda.forward(case.features, case.weight, None, case.geometry, 1)
    plenty = on_shim.state.shared_bytes
    monkeypatch.setattr(on_shim.state, "shared_at_most", 99 * 1024)
    cuda.forward(case.features, case.weight, None, case.geometry, 1)
    assert on_shim.state.shared_bytes < min(plenty, 99 * 1024)
    case.check(case.run())


def test_runs_on_the_callers_device_and_stream(on_shim) -> None:
    case = Case(MASKS["one"](), 4, 8, 8, torch.bfloat16)
    for call, launches in [
        (lambda: cuda.forward(case.features, case.weight, None, case.geometry, 1), 1),
        (lambda: cuda.grad_input(case.grad, case.weight, case.geometry, 1), 1),
        (lambda: cuda.grad_weight(case.grad, case.features, case.geometry, 1, case.weight), 2),
    ]:
        before = on_shim.state.launches
        call()
        state = on_shim.state
        assert (state.launches, state.launch_device, state.stream) == (before + launches, 1, 77)
        assert state.device == 0


def test_a_failed_launch_names_its_kernel(on_shim) -> None:
    case = Case(MASKS["one"](), 4, 8, 8, torch.bfloat16)
    for name, call in [
        ("conv_gather", lambda: cuda.forward(case.features, case.weight, None, case.geometry, 1)),
        ("conv_weight", lambda: cuda.grad_weight(case.grad, case.features, case.geometry, 1, case.weight)),
    ]:
        on_shim.state.fail_next = 9
        with pytest.raises(RuntimeError, match=f"{name}: cudaErrorInvalidConfiguration: "):
            call()
        assert on_shim.state.device == 0
    good = (64, 1, 64, 1, 1, 1, 4, 4)
    for args, *channels in [
        ((64, 1, 64, 1, 1, 1, 3, 3), 8, 8),
        ((64, 1, 64, 1, 1, 1, 32, 32), 8, 8),
        ((64, 1, 64, 1, 1, 1, 4, 8), 8, 8),
        (good, 12, 8),
        (good, 8, 0),
    ]:
        with pytest.raises(ValueError, match="conv_gather: patches of "):
            on_shim.module.conv_gather(0, 0, 2, args, *channels, False, 64, 64, 0, 64)
        with pytest.raises(ValueError, match="conv_weight: patches of "):
            on_shim.module.conv_weight(0, 0, 2, args, *channels, 64, 64, 64, 1, 64)
    with pytest.raises(ValueError, match=r"conv_gather: type 0; it takes 1 \(float16\)"):
        on_shim.module.conv_gather(0, 0, 0, good, 8, 8, False, 64, 64, 0, 64)
    for parts in (0, 2):
        with pytest.raises(ValueError, match="conv_weight: parts must be between 1 and 1"):
            on_shim.module.conv_weight(0, 0, 2, good, 8, 8, 64, 64, 64, parts, 64)


def test_what_is_not_supported_is_said_and_refused(on_shim) -> None:
    patches = ActivePatches(MASKS["equal"]())
    good = Geometry.of(patches, 4, cuda.WINDOW)
    x, w = torch.zeros(patches.rows(4), 8, dtype=torch.bfloat16), torch.zeros(8, 8, 3, 3, dtype=torch.bfloat16)
    assert cuda.unsupported(x, w, good, 1) is None
    before = on_shim.state.launches
    for features, weight, geometry, groups, message in [
        (x.float(), w.float(), good, 1, "got torch.float32 and torch.float32"),
        (x, w.half(), good, 1, "got torch.bfloat16 and torch.float16"),
        (x, w[:, :4], good, 2, "2 groups"),
        (x, w[..., :1, :1], Geometry.of(patches, 4, Window((1, 1))), 1, r"got Window\(kernel=\(1, 1\)"),
        (x, w, Geometry.of(patches, 4, Window((3, 3), (2, 2), (1, 1))), 1, r"stride=\(2, 2\)"),
        (x, w, Geometry.of(patches, 4, Window((3, 3), (1, 1), (2, 2), (2, 2))), 1, r"dilation=\(2, 2\)"),
        (x, w, Geometry.densifying(patches, 4, cuda.WINDOW), 1, "got sparse rows to a dense map"),
        (x, w, Geometry.of(patches, 1, cuda.WINDOW), 1, "got 1x1 pixels"),
        (x, w, Geometry.of(patches, 6, cuda.WINDOW), 1, "got 6x6 pixels"),
        (x, w, Geometry.dense(2, (8, 4), cuda.WINDOW, x.device), 1, "got 8x4 pixels"),
        (x[:, :4], w[:, :4], good, 1, "got 4 to 8"),
        (x, w[:6], good, 1, "got 8 to 6"),
        (x, w[:0], good, 1, "got 8 to 0"),
    ]:
        for call in (
            lambda: cuda.forward(features, weight, None, geometry, groups),  # noqa: B023
            lambda: cuda.grad_input(features, weight, geometry, groups),  # noqa: B023
            lambda: cuda.grad_weight(features, features, geometry, groups, weight),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=f"conv: the CUDA kernels do not run this: they take .*{message}"):
                call()
    for call, error, message in [
        (lambda: cuda.forward(x[1:], w, None, good, 1), ValueError, r"features must have shape \(96, 8\)"),
        (lambda: cuda.forward(x, w[..., :2], None, good, 1), ValueError, r"weight must have shape \(O, C, 3, 3\)"),
        (lambda: cuda.forward(x, w, x[0, :4], good, 1), ValueError, r"bias must have shape \(8,\)"),
        (lambda: cuda.forward(x, w, x[0].float(), good, 1), TypeError, "bias is torch.float32"),
        (lambda: cuda.grad_input(x[:, :4], w, good, 1), ValueError, r"grad must have shape \(96, 8\)"),
        (lambda: cuda.grad_weight(x[1:], x, good, 1, w), ValueError, r"grad must have shape \(96, 8\)"),
        (lambda: cuda.grad_weight(x, x[1:], good, 1, w), ValueError, r"features must have shape \(96, 8\)"),
        (lambda: cuda.grad_weight(x.half(), x, good, 1, w), ValueError, "got torch.float16 and torch.bfloat16"),
    ]:
        with pytest.raises(error, match=f"conv: .*{message}"):
            call()
    assert on_shim.state.launches == before


def test_tensors_on_the_cpu_are_refused() -> None:
    case = Case(MASKS["equal"](), 4, 8, 8, torch.bfloat16)
    with pytest.raises(ValueError, match="conv: the CUDA backend needs all tensors on one GPU; features is on cpu"):
        cuda.forward(case.features, case.weight, None, case.geometry, 1)
    with pytest.raises(ValueError, match="conv: the CUDA backend needs all tensors on one GPU; grad is on cpu"):
        cuda.grad_weight(case.grad, case.features, case.geometry, 1, case.weight)
