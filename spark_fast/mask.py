"""Which patches of each image are visible: kinds of masks, by name or of the user's own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

MaskRatio = float | tuple[float, float] | torch.Tensor
# (batch, grid, mask_ratio, generator, device) -> bool (B, gh, gw), True = visible; see `random_patch_mask`.
MaskKind = Callable[..., torch.Tensor]
Scores = Callable[[Callable[..., torch.Tensor], tuple[int, int], torch.Tensor], torch.Tensor]

RECTANGLES = 16  # of block_patch_mask; a handful is enough unless nearly all is hidden
SMALLEST_RECTANGLE = 1 / 12  # of the grid; BEiT: 16 of 196 patches
LONGEST_ASPECT = 1 / 0.3  # BEiT's


def keep_count(grid: tuple[int, int], mask_ratio: float) -> int:
    """Number of visible patches per image: round(gh * gw * (1 - mask_ratio)).

    Raises:
        TypeError: the ratio is not a number.
        ValueError: the ratio is outside [0, 1), or it leaves no patch of this grid visible.
    """
    gh, gw = grid
    if isinstance(mask_ratio, bool) or not isinstance(mask_ratio, int | float):
        raise TypeError(f"mask_ratio must be a number; got {mask_ratio!r}")
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio is the masked share of the patches, in [0, 1); got {mask_ratio}")
    if gh < 1 or gw < 1:
        raise ValueError(f"grid is (rows, columns) of patches, each at least 1; got {grid}")
    keep = round(gh * gw * (1 - mask_ratio))
    if keep == 0:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves no visible patch on a grid of {gh}x{gw}: "
            "lower mask_ratio, use larger images or a smaller patch_size"
        )
    return keep


def random_patch_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: MaskRatio,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Patches hidden at random; every image keeps the same number of them (paper, section 3.1).

    Args:
        batch: number of images B.
        grid: (gh, gw), patches per column and per row of an image. A patch may be a single pixel: (H, W).
        mask_ratio: share of the patches to hide; `round(gh * gw * (1 - mask_ratio))` stay visible. Two numbers
            (low, high): each image's own ratio is drawn evenly from between them. A tensor (B,): the images' ratios,
            which are read on the host.
        generator: source of randomness; the mask is drawn on its device (default: on `device`), then moved.
        device: device of the result.

    Returns:
        bool (B, gh, gw), True = visible ("active").

    Raises:
        TypeError, ValueError: `batch`, `grid` or `mask_ratio` out of range.
    """
    return _draw(_random, batch, grid, mask_ratio, generator, device)


def block_patch_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: MaskRatio,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Rectangles of hidden patches, one over the other until enough are hidden: the block-wise masks of BEiT
    (https://arxiv.org/abs/2106.08254, algorithm 1), but with exactly the wanted number of visible patches.

    A rectangle has a twelfth of the grid up to what is still to be hidden, a height of 0.3 to 1 / 0.3 of its width, and
    lies over a random patch that is not yet hidden. The one with which they are too many shrinks towards its centre.
    What 16 rectangles do not cover is hidden at random.

    Args, returns, raises: as for `random_patch_mask`.
    """
    return _draw(_block, batch, grid, mask_ratio, generator, device)


def grid_patch_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: MaskRatio,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Visible patches on a regular lattice: the grid-wise sampling of MAE (https://arxiv.org/abs/2111.06377, figure 6),
    which keeps one of every four patches, for any ratio.

    One of every `a` rows and one of every `b` columns is chosen, a and b at least 2 (if the grid has two), with a * b
    near 1 / (1 - mask_ratio); each image's lattice is shifted at random. Where the lattice has fewer patches than are
    to be visible, others are added at random; where it has more, some are left out. So mask_ratio=0.75 is (but for an
    odd border) the lattice alone, a ratio well below that is a lattice and random patches.

    Args, returns, raises: as for `random_patch_mask`.
    """
    return _draw(_grid, batch, grid, mask_ratio, generator, device)


def mesh_patch_mask(
    batch: int,
    grid: tuple[int, int],
    mask_ratio: MaskRatio,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Visible patches on the fields of one colour of a checkerboard; which colour is drawn for each image.

    Half of the patches are of one colour. At a higher ratio some of them are hidden too, at random, so that no two
    visible patches share a side; at a lower one some of the other colour are visible. "Mesh mask" is the name of a
    pattern for SparK in https://arxiv.org/abs/2505.08819; this definition is ours and may differ from theirs.

    Args, returns, raises: as for `random_patch_mask`.
    """
    return _draw(_mesh, batch, grid, mask_ratio, generator, device)


class FixedMask(nn.Module):
    """The same mask for every image, as a kind of mask; a buffer that moves with the model and is not saved with it.

    Args:
        active: bool (gh, gw), True = visible.

    Attributes:
        mask_ratio: the share that it hides.

    Raises:
        TypeError, ValueError: `active` is not that, or shows no patch.
    """

    exact = True

    def __init__(self, active: torch.Tensor):
        super().__init__()
        if active.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor (True = visible); got {active.dtype}")
        if active.dim() != 2 or not active.any():
            raise ValueError(
                "mask as a tensor is (grid rows, grid columns) with at least one visible patch; got shape "
                f"{tuple(active.shape)}, {int(active.sum())} visible. A mask per image is given with the images: active"
            )
        self.register_buffer("active", active.clone(), persistent=False)
        self.mask_ratio = 1 - int(active.sum()) / active.numel()

    def check(self, grid: tuple[int, int]) -> None:
        """ValueError unless this is a mask for that grid."""
        if tuple(self.active.shape) != tuple(grid):
            raise ValueError(f"mask is a tensor {tuple(self.active.shape)}, but the grid of patches is {tuple(grid)}")

    def forward(self, batch, grid, mask_ratio, generator=None, device=None) -> torch.Tensor:
        """The mask for `batch` images; the other arguments are those of every kind. ValueError for another grid."""
        self.check(grid)
        return self.active.to(self.active.device if device is None else device).expand(batch, *grid)


_KINDS: dict[str, MaskKind] = {
    "random": random_patch_mask,
    "block": block_patch_mask,
    "grid": grid_patch_mask,
    "mesh": mesh_patch_mask,
}
for _kind in _KINDS.values():
    _kind.exact = True


def register_mask(name: str) -> Callable[[MaskKind], MaskKind]:
    """Decorator that names a mask kind of yours, for `SparK(mask=name)` and the setting `mask_kind` of `pretrain`.

    The function is called as kind(batch, grid, mask_ratio, generator, device), the arguments of `random_patch_mask`,
    and returns bool (B, gh, gw), True = visible. If it keeps `keep_count(grid, mask_ratio)` patches in every image
    wherever mask_ratio is one number, set `function.exact = True`: then the patches need not be counted, and a GPU is
    not waited for.

    Raises:
        TypeError: `name` is no string.
        ValueError: the name is taken.
    """
    if not isinstance(name, str):
        raise TypeError(f'register_mask needs a name: write @register_mask("name"); got {name!r}')
    if name in _KINDS:
        raise ValueError(f"name={name!r} is taken by {_KINDS[name]}")

    def register(kind: MaskKind) -> MaskKind:
        _KINDS[name] = kind
        return kind

    return register


def find_mask(mask: str | MaskKind | torch.Tensor, argument: str = "mask") -> MaskKind:
    """The kind of a name, of a function (itself), or of a tensor (`FixedMask`).

    Raises:
        TypeError, ValueError: `mask` is none of these; `argument` is what the message calls it.
    """
    if isinstance(mask, torch.Tensor):
        return FixedMask(mask)
    if isinstance(mask, str):
        if mask not in _KINDS:
            raise ValueError(
                f"{argument}={mask!r} is no kind of mask, need one of {', '.join(_KINDS)}; register_mask adds one"
            )
        return _KINDS[mask]
    if not callable(mask):
        raise TypeError(f"{argument} must be a name, a function or a bool tensor (gh, gw); got {type(mask).__name__}")
    return mask


def is_exact(kind: MaskKind, mask_ratio: MaskRatio) -> bool:
    """Whether every image is known to keep `keep_count(grid, mask_ratio)` patches, without counting."""
    return not isinstance(mask_ratio, tuple | list | torch.Tensor) and bool(getattr(kind, "exact", False))


def _draw(
    scores: Scores,
    batch: int,
    grid: tuple[int, int],
    mask_ratio: MaskRatio,
    generator: torch.Generator | None,
    device: torch.device | str | None,
) -> torch.Tensor:
    """The patches with the lowest scores (B, L), as many as are to be visible, as a mask (B, gh, gw)."""
    if batch < 0:
        raise ValueError(f"batch must not be negative; got {batch}")
    draw_on = device if generator is None else generator.device
    given = {} if generator is None else {"generator": generator}  # torch.compile of any batch knows no None here

    def rand(*size: int) -> torch.Tensor:
        return torch.rand(batch, *size, device=draw_on, **given)

    keep = _keep(rand, batch, grid, mask_ratio)
    per_image = torch.full((batch, 1), keep, device=draw_on) if isinstance(keep, int) else keep
    order = scores(rand, grid, per_image).argsort(dim=1)
    if isinstance(keep, int):
        active = torch.zeros(order.shape, dtype=torch.bool, device=draw_on).scatter_(1, order[:, :keep], True)
    else:
        active = order.argsort(dim=1) < keep
    return active.view(batch, *grid).to(device if device is not None else draw_on)


def _keep(
    rand: Callable[..., torch.Tensor], batch: int, grid: tuple[int, int], mask_ratio: MaskRatio
) -> int | torch.Tensor:
    """Visible patches of an image: one number, or (B, 1) where each image has its own ratio."""
    if isinstance(mask_ratio, torch.Tensor):
        if tuple(mask_ratio.shape) != (batch,) or not mask_ratio.is_floating_point():
            raise ValueError(
                f"mask_ratio as a tensor is one ratio per image, ({batch},), floating point; got "
                f"{tuple(mask_ratio.shape)} of {mask_ratio.dtype}"
            )
        ratios = mask_ratio.to(rand(0).device, torch.float64)
        low, high = torch.stack(ratios.aminmax()).tolist() if batch else (0.0, 0.0)
    elif isinstance(mask_ratio, tuple | list):
        low, high = check_range(grid, mask_ratio)
        ratios = low + (high - low) * rand().double()
    else:
        return keep_count(grid, mask_ratio)
    fewest, most = keep_count(grid, high), keep_count(grid, low)
    return ((1 - ratios) * (grid[0] * grid[1])).round().long().clamp(fewest, most)[:, None]


def check_range(grid: tuple[int, int], mask_ratio: tuple[float, float] | list[float]) -> tuple[float, float]:
    """The smallest and the largest ratio of a range; TypeError or ValueError if it is none, as `keep_count`."""
    if len(mask_ratio) != 2:
        raise ValueError(f"mask_ratio as a range is two numbers, (low, high); got {tuple(mask_ratio)}")
    low, high = mask_ratio
    keep_count(grid, low), keep_count(grid, high)
    if low > high:
        raise ValueError(f"mask_ratio as a range is (low, high); got {tuple(mask_ratio)}")
    return low, high


def _random(rand: Callable[..., torch.Tensor], grid: tuple[int, int], keep: torch.Tensor) -> torch.Tensor:
    return rand(grid[0] * grid[1])


def _mesh(rand: Callable[..., torch.Tensor], grid: tuple[int, int], keep: torch.Tensor) -> torch.Tensor:
    colour = (rand(1, 1) < 0.5).long()
    row, col = _places(grid, keep.device)
    return rand(grid[0] * grid[1]) + ((row + col + colour) % 2).flatten(1)


def _grid(rand: Callable[..., torch.Tensor], grid: tuple[int, int], keep: torch.Tensor) -> torch.Tensor:
    row, col = _places(grid, keep.device)
    row_step, col_step = _lattice(grid, keep)
    row_shift, col_shift = (rand(1, 1) * row_step).long(), (rand(1, 1) * col_step).long()
    lattice = ((row - row_shift) % row_step == 0) & ((col - col_shift) % col_step == 0)
    return rand(grid[0] * grid[1]) + (~lattice).flatten(1)


def _lattice(grid: tuple[int, int], keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One of how many rows and one of how many columns are in the lattice, (B, 1, 1) each."""
    per_visible = grid[0] * grid[1] / keep[:, :, None]
    short, long = min(grid), max(grid)
    first = per_visible.sqrt().round().clamp(min=2).clamp(max=short)  # of the shorter side, which may not have as many
    second = (per_visible / first).round().clamp(min=2).clamp(max=long)
    return (first.long(), second.long()) if grid[0] <= grid[1] else (second.long(), first.long())


def _block(rand: Callable[..., torch.Tensor], grid: tuple[int, int], keep: torch.Tensor) -> torch.Tensor:
    """Minus the time when a patch is hidden: first rectangle over it, plus the distance from its centre."""
    gh, gw = grid
    row, col = _places(grid, keep.device)
    noise = rand(gh, gw)
    hide, smallest = (gh * gw - keep)[:, :, None], max(1.0, SMALLEST_RECTANGLE * gh * gw)
    time = torch.full_like(noise, RECTANGLES)
    for number in range(RECTANGLES):
        free = time == RECTANGLES
        left = hide - (gh * gw - free.sum((1, 2), keepdim=True))
        size, aspect, down, right = rand(4, 1, 1).unbind(1)  # (B, 1, 1) each
        area = smallest + size * (left - smallest).clamp(min=0)
        ratio = LONGEST_ASPECT ** (2 * aspect - 1)
        height, width = (area * ratio).sqrt().round().clamp(1, gh), (area / ratio).sqrt().round().clamp(1, gw)
        target = torch.where(free, noise, -1).flatten(1).argmax(1)[:, None, None]
        top, first = _start(target // gw, height, gh, down), _start(target % gw, width, gw, right)
        # Distance of patch centres from the rectangle's, in its sides: below 1 / 2 inside.
        far_row = ((row + 0.5 - top - height / 2) / height).abs()
        far_col = ((col + 0.5 - first - width / 2) / width).abs()
        far = torch.maximum(far_row, far_col)
        time = torch.where(free & (far < 0.5), number + far, time)
    return -(time + 1e-4 * noise).flatten(1)


def _start(target: torch.Tensor, length: torch.Tensor, extent: int, where: torch.Tensor) -> torch.Tensor:
    """Where a stretch of this length starts that lies within the extent and over the target; `where` in [0, 1)."""
    earliest, latest = (target - length + 1).clamp(min=0), torch.minimum(target, extent - length)
    return earliest + (where * (latest - earliest + 1)).floor()


def _places(grid: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of a patch, (1, gh, 1) and (1, 1, gw)."""
    return torch.arange(grid[0], device=device)[None, :, None], torch.arange(grid[1], device=device)[None, None, :]
