"""The tables that every layer shares: which patches of which image are active, and where their rows lie."""

from __future__ import annotations

from functools import cached_property

import torch


class ActivePatches:
    """The active patches of a batch of images, sorted by (image, grid row, grid column).

    Args:
        active: bool (B, gh, gw), True = visible. Images may keep different numbers of patches, or none.
        per_image: the number of active patches if it is known to be the same in every image. With it the tables are
            built with static shapes and without a host sync (the claim is checked on the device, asynchronously);
            without it the patches are counted.

    Attributes:
        active: bool (B, gh, gw).
        origin: for the single pixels that stand for a patch mask on a map which is no whole number of pixels for each
            patch, the patches of that mask; else None.
        grid_to_patch: int32 (B, gh, gw), index of the patch, -1 where masked.
        coords: int32 (P, 3), image, grid row and grid column of each patch.
        index: the same as three int64 (P,), for indexing.
        count: P.
        per_image: patches per image when it is the same for all, else None.

    Raises:
        TypeError: `active` is not a bool tensor.
        ValueError: `active` is not (B, gh, gw), or is on meta and to be counted, or `per_image` does not fit.
    """

    origin: ActivePatches | None = None

    def __init__(self, active: torch.Tensor, per_image: int | None = None):
        if not isinstance(active, torch.Tensor) or active.dtype != torch.bool:
            got = active.dtype if isinstance(active, torch.Tensor) else type(active).__name__
            raise TypeError(f"active must be a bool tensor (True = visible); got {got}. Use mask.bool() or mask > 0")
        if active.dim() != 3 or active.shape[1] < 1 or active.shape[2] < 1:
            raise ValueError(
                f"active must be (batch, grid rows, grid columns); got shape {tuple(active.shape)}. "
                "For (B, 1, gh, gw) use active.squeeze(1)"
            )
        active = active.clone(memory_format=torch.contiguous_format)  # the caller may go on changing its own
        flat = active.flatten(1)  # (B, L)
        if per_image is None:
            if active.device.type == "meta":
                raise ValueError("active is on meta, which holds no values to count; put it on a real device")
            counts = flat.sum(1).tolist()
            if counts and min(counts) == max(counts):
                per_image = counts[0]
            place = torch.nonzero_static(flat.flatten(), size=sum(counts)).squeeze(1)
            image, place = place // flat.shape[1], place % flat.shape[1]
        else:
            if not 0 <= per_image <= flat.shape[1]:
                raise ValueError(f"per_image must be between 0 and the {flat.shape[1]} patches of the grid")
            torch._assert_async(
                (flat.sum(1) == per_image).all(), f"active does not keep per_image={per_image} patches in every image"
            )
            # A stable sort of the flags puts the active places first, in order.
            place = flat.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :per_image].flatten()
            image = torch.arange(active.shape[0], device=active.device).repeat_interleave(
                per_image, output_size=active.shape[0] * per_image
            )
        self._fill(active, per_image, image, place)

    def _fill(self, active: torch.Tensor, per_image: int | None, image: torch.Tensor, place: torch.Tensor) -> None:
        """Sets the tables; patch i is number `place[i]` of the grid of image `image[i]`."""
        gw = active.shape[2]
        row, col = place // gw, place % gw
        numbers = torch.arange(place.shape[0], dtype=torch.int32, device=active.device)
        self.active = active
        self.per_image = per_image
        self.index = (image, row, col)
        self.coords = torch.stack((image, row, col), dim=1).to(torch.int32)
        self.grid_to_patch = torch.full(active.shape, -1, dtype=torch.int32, device=active.device)
        self.grid_to_patch.view(-1)[image * (active.shape[1] * gw) + place] = numbers
        self.derived: dict[object, object] = {}  # what ops compute once from these tables
        self._complement: ActivePatches | None = None

    @classmethod
    def from_tables(
        cls, coords: torch.Tensor, grid_to_patch: torch.Tensor, per_image: int | None = None
    ) -> ActivePatches:
        """The patches that have these tables, which are neither checked nor copied; all else is derived from them when
        it is asked for, without a host sync."""
        patches = cls.__new__(cls)
        patches.coords, patches.grid_to_patch, patches.per_image = coords, grid_to_patch, per_image
        patches.derived, patches._complement = {}, None
        return patches

    @classmethod
    def of_coords(cls, coords: torch.Tensor, shape: tuple[int, int, int]) -> tuple[ActivePatches, torch.Tensor]:
        """The pixels at `coords` as patches of one pixel each, and where each of `coords` is among them. One host sync.

        Args:
            coords: integer (N, 3), image, row and column, in any order.
            shape: images, rows and columns.

        Returns:
            the N patches, of grid (rows, columns), and int64 (N,): the patch at coords[i] is number places[i].

        Raises:
            TypeError: `coords` is not an integer tensor, or `shape` not three whole numbers.
            ValueError: `coords` is not (N, 3), or on meta; or a pixel lies outside `shape` or is given twice.
        """
        batch, height, width = shape = _three_sizes(shape)
        cell, inside = _cells(coords, shape)
        flags = torch.zeros(batch * height * width + 1, dtype=torch.bool, device=coords.device)
        flags[cell] = True
        active = flags[:-1].view(batch, height, width)
        outside, *counts = torch.cat(((~inside).sum().view(1), active.flatten(1).sum(1))).tolist()
        if outside:
            raise ValueError(_first(f"{outside} pixels lie outside shape={shape}", coords, ~inside))
        if sum(counts) < len(coords):
            order = cell.argsort(stable=True)
            again = torch.zeros_like(inside)
            again[order[1:]] = cell[order].diff() == 0
            raise ValueError(_first(f"{len(coords) - sum(counts)} pixels are given more than once", coords, again))
        patches = cls._counted(active, sum(counts), counts[0] if len(set(counts)) == 1 else None)
        return patches, patches.grid_to_patch.flatten()[cell].long()

    @classmethod
    def _counted(cls, active: torch.Tensor, count: int, per_image: int | None) -> ActivePatches:
        """The patches of `active`, of which `count` is known, without a host sync."""
        patches, grid = cls.__new__(cls), active.shape[1] * active.shape[2]
        found = torch.nonzero_static(active.flatten(), size=count).squeeze(1)
        patches._fill(active, per_image, found // grid, found % grid)
        return patches

    @cached_property
    def active(self) -> torch.Tensor:
        return self.grid_to_patch >= 0

    @cached_property
    def index(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.coords.long().unbind(1)

    @property
    def count(self) -> int:
        return self.coords.shape[0]

    @property
    def batch(self) -> int:
        return self.grid_to_patch.shape[0]

    @property
    def grid(self) -> tuple[int, int]:
        return self.grid_to_patch.shape[1], self.grid_to_patch.shape[2]

    @property
    def device(self) -> torch.device:
        return self.grid_to_patch.device

    def rows(self, side: int) -> int:
        """Number of packed rows of a map whose patches are `side` pixels wide."""
        return self.count * side * side

    def pixel_coords(self, side: int) -> torch.Tensor:
        """Image, row and column of each packed row of a map whose patches are `side` pixels wide: int32 (rows, 3)."""
        if side == 1:
            return self.coords
        image, row, col = (i[:, None, None] for i in self.coords.unbind(1))  # (P, 1, 1)
        inside = torch.arange(side, dtype=torch.int32, device=self.device)
        shape = (self.count, side, side)
        pixels = image.expand(shape), (row * side + inside[:, None]).expand(shape), (col * side + inside).expand(shape)
        return torch.stack(pixels, dim=-1).view(-1, 3)

    def pixels(self, side: int) -> tuple[ActivePatches, torch.Tensor]:
        """The same pixels as patches of one pixel each, without a host sync; made once.

        Returns:
            the patches, of grid (gh * side, gw * side), and int64 (rows,): packed row i of a map whose patches are
            `side` pixels wide is row places[i] of the pixels.
        """
        if torch.compiler.is_compiling():  # what a compiled graph makes may not outlive it
            return self._pixels(side)
        key = ("pixels", side)
        if key not in self.derived:
            with torch.inference_mode(False):  # they stay, perhaps for a training step
                self.derived[key] = self._pixels(side)
        return self.derived[key]

    def _pixels(self, side: int) -> tuple[ActivePatches, torch.Tensor]:
        fine = self.active.repeat_interleave(side, 1).repeat_interleave(side, 2)
        per_image = None if self.per_image is None else self.per_image * side * side
        patches = ActivePatches._counted(fine, self.rows(side), per_image)
        image, row, col = self.pixel_coords(side).long().unbind(1)
        return patches, patches.grid_to_patch[image, row, col].long()

    def rows_at(self, coords: torch.Tensor, side: int) -> torch.Tensor:
        """The packed rows int64 (N,) of the pixels at `coords`, of a map whose patches are `side` pixels wide. One host
        sync, for the check.

        Args:
            coords: integer (N, 3), image, row and column, in any order; a pixel may come twice.

        Raises:
            TypeError: `coords` is not an integer tensor.
            ValueError: `coords` is not (N, 3), or on another device, or a pixel is not active.
        """
        (gh, gw), area = self.grid, side * side
        cell, inside = _cells(coords, (self.batch, gh * side, gw * side))
        if coords.device != self.device:
            raise ValueError(f"coords are on {coords.device}, patches on {self.device}; move one with .to()")
        image, row, col = (coords * inside[:, None]).long().unbind(1)  # what lies outside looks at the first
        active = inside
        patch = cell
        if self.batch:
            patch = self.grid_to_patch[image, row // side, col // side].long()
            active = inside & (patch >= 0)
        if not active.all():
            raise ValueError(_first(f"{int((~active).sum())} pixels are not active", coords, ~active))
        return patch * area + row % side * side + col % side

    def image(self, number: int) -> ActivePatches:
        """The patches of one image alone; made once."""
        key = ("image", number)
        if key not in self.derived:
            with torch.inference_mode(False):
                self.derived[key] = ActivePatches(self.active[number : number + 1], self.per_image)
        return self.derived[key]

    def at(self, size: tuple[int, int]) -> ActivePatches:
        """The mask on a map of `size` (height, width) pixels: these patches where that is a whole number of pixels for
        each, the same in both directions; else patches of one pixel, active if any of the mask's patches that they
        touch is. Made once for a size, with a host sync for their number; maps of one size have the same patches.
        """
        mask = self.origin or self
        (gh, gw), (height, width) = mask.grid, size
        if height % gh == width % gw == 0 and height // gh == width // gw:
            return mask
        key = ("at", height, width)
        if key not in mask.derived:
            with torch.inference_mode(False):  # they stay, perhaps for a training step
                active = torch.nn.functional.adaptive_max_pool2d(mask.active[:, None].float(), size)[:, 0] > 0
                pixels = ActivePatches(active)
                pixels.origin = mask
            mask.derived[key] = pixels
        return mask.derived[key]

    def complement(self) -> ActivePatches:
        """The masked patches, as patches, without a host sync; made once, since the loss and every stage's mask token
        ask for them."""
        if self._complement is None:
            grid = self.grid[0] * self.grid[1]
            masked = ~self.active
            # As above, over all images together: their number is known, but not how they are shared out.
            order = masked.flatten().to(torch.int8).argsort(descending=True, stable=True)
            found = order[: self.batch * grid - self.count]
            complement = ActivePatches.__new__(ActivePatches)
            per_image = None if self.per_image is None else grid - self.per_image
            complement._fill(masked, per_image, found // grid, found % grid)
            self._complement = complement
        return self._complement

    def __repr__(self) -> str:
        kept = "varying counts" if self.per_image is None else f"{self.per_image} per image"
        return (
            f"ActivePatches(batch={self.batch}, grid={self.grid}, active={self.count} ({kept}), device={self.device})"
        )


def _three_sizes(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    sizes = tuple(shape)
    if len(sizes) != 3 or not all(isinstance(size, int) for size in sizes):
        raise TypeError(f"shape must be three whole numbers (images, rows, columns); got {shape!r}")
    if sizes[0] < 0 or min(sizes[1:]) < 1:
        raise ValueError(f"shape must be (images, rows, columns), rows and columns at least 1; got {shape!r}")
    return sizes


def _cells(coords: torch.Tensor, shape: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each pixel in a batch of `shape`, int64 (N,), one after the last if it lies outside, and whether it
    lies inside."""
    if not isinstance(coords, torch.Tensor):
        raise TypeError(f"coords must be an integer tensor (N, 3); got {type(coords).__name__}")
    if coords.dtype.is_floating_point or coords.dtype.is_complex or coords.dtype == torch.bool:
        raise TypeError(f"coords must be integers (image, row, column); got {coords.dtype}. Use coords.long()")
    if coords.dim() != 2 or coords.shape[1] != 3:
        raise ValueError(f"coords must be (N, 3): image, row, column; got shape {tuple(coords.shape)}")
    if coords.device.type == "meta":
        raise ValueError("coords are on meta, which holds no values; put them on a real device")
    batch, height, width = shape
    image, row, col = coords.long().unbind(1)
    inside = (image >= 0) & (image < batch) & (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return torch.where(inside, (image * height + row) * width + col, batch * height * width), inside


def _first(problem: str, coords: torch.Tensor, which: torch.Tensor) -> str:
    """The message about pixels, with the first of them."""
    number = int(which.nonzero()[0, 0])
    return f"coords (image, row, column): {problem}, such as coords[{number}] = {coords[number].tolist()}"
