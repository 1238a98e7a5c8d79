"""csrc/densify_cuda.cu against plain PyTorch: on the CPU by csrc/cuda_shim, on a GPU where there is one."""

from __future__ import annotations

import itertools
import mmap
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spark_fast.ops import native_cuda
from spark_fast.ops.densify import cuda
from spark_fast.patches import ActivePatches

CHANNELS = [1, 3, 7, 8, 65]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
GRID = (2, 3)
MASKS = {
    "none": lambda: torch.zeros(2, *GRID, dtype=torch.bool),
    "all": lambda: torch.ones(2, *GRID, dtype=torch.bool),
    "equal": lambda: torch.tensor([[[1, 0, 0], [0, 1, 1]], [[0, 1, 1], [1, 0, 0]]], dtype=torch.bool),
    "unequal": lambda: torch.tensor([[[0, 0, 0], [0, 0, 0]], [[1, 0, 1], [1, 1, 1]], [[0, 0, 0], [0, 1, 0]]]).bool(),
    "no images": lambda: torch.zeros(0, *GRID, dtype=torch.bool),
}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "cut out of a larger map": lambda t: torch.nn.functional.pad(t, (2, 1, 1, 3, 1, 2))[:, 1:-2, 1:-3, 2:-1],
    "width before height": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "one channel repeated": lambda t: t[:, :1].expand(t.shape),
    "one image repeated": lambda t: t[:1].expand(t.shape),
}


def random_bits(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Every bit pattern may come, NaNs too: the kernels copy bits."""
    bits = torch.randint(-(2**15), 2**15, (*shape, dtype.itemsize // 2), dtype=torch.int16)
    return bits.view(dtype).squeeze(-1).to(device)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(BITS[a.itemsize]), b.contiguous().view(BITS[b.itemsize])
    )


def tiles_of(images: Tensor, grid: tuple[int, int]) -> Tensor:  # -> (B, gh, gw, side, side, C), a view
    side = images.shape[2] // grid[0]
    return images.unflatten(3, (grid[1], side)).unflatten(2, (grid[0], side)).permute(0, 2, 4, 3, 5, 1)


def expected_rows(images: Tensor, active: Tensor) -> Tensor:
    return tiles_of(images, active.shape[1:])[active].reshape(-1, images.shape[1])


def expected_maps(rows: Tensor, active: Tensor, side: int, fill: Tensor | None) -> Tensor:
    (batch, gh, gw), channels = active.shape, rows.shape[1]
    dense = torch.zeros(batch, channels, gh * side, gw * side, dtype=rows.dtype, device=rows.device)
    if fill is not None:
        dense = dense + fill.view(1, -1, 1, 1)
    tiles_of(dense, (gh, gw))[active] = rows.view(-1, side, side, channels)
    return dense


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", [1, 3, 8])
def test_gather(device: str, side: int, dtype: torch.dtype) -> None:
    for mask, channels, layout in itertools.product(MASKS, CHANNELS, LAYOUTS):
        active = MASKS[mask]().to(device)
        shape = len(active), channels, GRID[0] * side, GRID[1] * side
        images = LAYOUTS[layout](random_bits(*shape, dtype=dtype, device=device))
        rows = cuda.gather(images, ActivePatches(active))
        assert rows.is_contiguous()
        assert same_bits(rows, expected_rows(images, active)), (mask, channels, layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", [1, 3, 8])
def test_scatter(device: str, side: int, dtype: torch.dtype) -> None:
    for mask, channels in itertools.product(MASKS, CHANNELS):
        active = MASKS[mask]().to(device)
        patches = ActivePatches(active)
        rows = random_bits(patches.rows(side), channels, dtype=dtype, device=device)
        fill = torch.randn(channels).to(device, dtype)
        every_other = fill.repeat_interleave(2)[::2]
        across = rows.t().contiguous().t()
        for features, given in [(rows, None), (rows, fill), (rows, every_other), (across, None)]:
            dense = cuda.scatter(features, patches, side, given)
            assert dense.is_contiguous(memory_format=torch.channels_last)
            assert same_bits(dense, expected_maps(rows, active, side, given)), (mask, channels)


def test_lazy_negation_is_not_lost(device: str) -> None:
    active = MASKS["equal"]().to(device)
    patches = ActivePatches(active)
    images = torch.randn(2, 3, *GRID, dtype=torch.complex64, device=device).conj().imag
    assert images.is_neg()
    rows = expected_rows(images.clone(), active)
    torch.testing.assert_close(cuda.gather(images, patches), rows, rtol=0, atol=0)
    lazy = torch._neg_view(rows)
    torch.testing.assert_close(
        cuda.scatter(lazy, patches, 1, None), expected_maps(-rows, active, 1, None), rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("channels", "offset", "dtype", "width"),
    [(8, 0, torch.bfloat16, 16), (24, 0, torch.bfloat16, 16), (8, 1, torch.bfloat16, 2), (12, 0, torch.bfloat16, 8),
     (7, 0, torch.bfloat16, 2), (8, 0, torch.float64, 16), (3, 0, torch.float64, 8), (6, 0, torch.float32, 8)],
)  # fmt: skip
def test_copies_are_as_wide_as_the_alignment_allows(on_shim, channels, offset, dtype, width) -> None:
    active = MASKS["equal"]()
    patches = ActivePatches(active)
    memory = random_bits(offset + 2 * 4 * 6 * channels, dtype=dtype, device="cpu")
    images = memory[offset:].view(2, 4, 6, channels).permute(0, 3, 1, 2)
    assert same_bits(cuda.gather(images, patches), expected_rows(images, active))
    assert on_shim.state.element_size == width
    rows = memory[offset : offset + patches.rows(2) * channels].view(-1, channels)
    assert same_bits(cuda.scatter(rows, patches, 2, None), expected_maps(rows, active, 2, None))
    assert on_shim.state.element_size == width
    cuda.gather(images.contiguous(), patches)  # channels far apart
    assert on_shim.state.element_size == dtype.itemsize


def test_offsets_beyond_32_bits(on_shim) -> None:
    far = 2**31 + 8  # elements from one image to the next; only the touched pages of the map take memory
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (far + 64)), dtype=torch.int16).view(torch.bfloat16)
    images = memory.as_strided((2, 3, 2, 2), (far, 4, 2, 1))
    images.copy_(torch.arange(24).view(2, 3, 2, 2))
    active = torch.ones(2, 1, 1, dtype=torch.bool)
    assert same_bits(cuda.gather(images, ActivePatches(active)), expected_rows(images, active))


def test_nothing_is_written_outside_the_output(on_shim) -> None:
    active = MASKS["unequal"]()
    patches, side, channels, margin = ActivePatches(active), 3, 7, 64
    images = random_bits(3, channels, 6, 9, dtype=torch.bfloat16, device="cpu")
    rows = expected_rows(images, active)
    calls = [
        (rows.numel(), on_shim.module.gather_patches,
         (images.data_ptr(), images.stride(), patches.coords.data_ptr(), patches.count, side, channels)),
        (images.numel(), on_shim.module.scatter_patches,
         (rows.data_ptr(), 0, patches.grid_to_patch.data_ptr(), 3, *GRID, side, channels)),
    ]  # fmt: skip
    for size, run, arguments in calls:
        memory = torch.full((size + 2 * margin,), 0x5A5A, dtype=torch.int16)
        run(0, 0, images.element_size(), *arguments, memory[margin:].data_ptr())
        assert (memory[:margin] == 0x5A5A).all() and (memory[-margin:] == 0x5A5A).all()


def test_runs_on_the_callers_device_and_stream(on_shim) -> None:
    patches = ActivePatches(MASKS["all"]())
    images, rows = torch.zeros(2, 3, *GRID), torch.zeros(12, 3)
    for call in (lambda: cuda.gather(images, patches), lambda: cuda.scatter(rows, patches, 1, None)):
        before = on_shim.state.launches
        call()
        assert (on_shim.state.launches, on_shim.state.launch_device, on_shim.state.stream) == (before + 1, 1, 77)
        assert on_shim.state.device == 0


def test_a_failed_launch_names_its_kernel(on_shim) -> None:
    patches = ActivePatches(MASKS["all"]())
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="gather_patches: cudaErrorInvalidConfiguration: "):
        cuda.gather(torch.zeros(2, 3, *GRID), patches)
    on_shim.state.fail_next = 9
    with pytest.raises(RuntimeError, match="scatter_patches: cudaErrorInvalidConfiguration: "):
        cuda.scatter(torch.zeros(12, 3), patches, 1, None)
    assert on_shim.state.device == 0
    with pytest.raises(RuntimeError, match="gather_patches: cudaErrorInvalidDevice: "):
        on_shim.module.gather_patches(7, 0, 2, 64, (1, 1, 1, 1), 64, 1, 1, 1, 64)
    cuda.gather(torch.zeros(2, 3, *GRID), patches)  # an error is reported once
    with pytest.raises(ValueError, match="gather_patches: elements of 1 bytes"):
        on_shim.module.gather_patches(0, 0, 2, 65, (1, 1, 1, 1), 64, 1, 1, 1, 64)


def test_a_gpu_that_the_module_was_not_compiled_for_is_no_choice(on_shim, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    reason = native_cuda.unavailable.__wrapped__
    assert reason() is None
    on_shim.state.fail_next = 9
    assert re.search(r"does not run on this GPU.*check_device: cudaError.*compiled for cpu", reason())
    assert reason() is None and on_shim.state.device == 0


def test_arguments_are_refused_before_native_code(on_shim) -> None:
    patches = ActivePatches(MASKS["equal"]())
    images, rows = torch.zeros(2, 4, 4, 6), torch.zeros(patches.rows(2), 4)
    before = on_shim.state.launches
    for call, error, message in [
        (lambda: cuda.gather([], patches), TypeError, "images must be a floating point tensor; got list"),
        (lambda: cuda.gather(images.to(torch.uint8), patches), TypeError, "got torch.uint8"),
        (lambda: cuda.gather(images[0], patches), ValueError, "images must be"),
        (lambda: cuda.gather(images[:1], patches), ValueError, "batch 2"),
        (lambda: cuda.gather(images[:, :, :3], patches), ValueError, "2x3 square patches"),
        (lambda: cuda.gather(images[..., :3], patches), ValueError, "2x3 square patches"),
        (lambda: cuda.gather(images[:, :, :0], patches), ValueError, "2x3 square patches"),
        (lambda: cuda.scatter(rows, patches, 0, None), ValueError, "side must be"),
        (lambda: cuda.scatter(rows[1:], patches, 2, None), ValueError, "24 rows"),
        (lambda: cuda.scatter(rows.int(), patches, 2, None), TypeError, "floating point"),
        (lambda: cuda.scatter(rows, patches, 2, rows[0, :3]), ValueError, r"fill must have shape \(4,\)"),
        (lambda: cuda.scatter(rows, patches, 2, rows[0].double()), TypeError, "fill is torch.float64"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert on_shim.state.launches == before


def test_tensors_on_the_cpu_are_refused() -> None:
    patches = ActivePatches(MASKS["equal"]())
    with pytest.raises(ValueError, match=r"gather_patches: the CUDA backend needs .* one GPU; images is on cpu"):
        cuda.gather(torch.zeros(2, 4, 4, 6), patches)
    with pytest.raises(ValueError, match=r"scatter_patches: .* one GPU; features is on cpu"):
        cuda.scatter(torch.zeros(patches.rows(2), 4), patches, 2, None)
