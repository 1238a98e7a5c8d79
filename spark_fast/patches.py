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
        grid_to_patch: int32 (B, gh, gw), index of the patch, -1 where masked.
        coords: int32 (P, 3), image, grid row and grid column of each patch.
        index: the same as three int64 (P,), for indexing.
        count: P.
        per_image: patches per image when it is the same for all, else None.

    Raises:
        TypeError: `active` is not a bool tensor.
        ValueError: `active` is not (B, gh, gw), or is on meta and to be counted, or `per_image` does not fit.
    """

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
            image, place = flat.nonzero(as_tuple=True)
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
