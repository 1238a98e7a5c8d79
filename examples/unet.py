"""Pre-train the encoder of a hand-written U-Net on synthetic images, then train the whole network to segment them.

`python examples/unet.py` takes under a minute on two CPU cores and downloads nothing. With so few images it shows how
the parts fit together, not what pre-training is worth.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import spark_fast as sf

SIDE = 64


class UNet(nn.Module):
    """Four times down, four times up, with skip connections."""

    def __init__(self, width: int = 16, classes: int = 2):
        super().__init__()
        sizes = [width << i for i in range(5)]
        self.stem = block(3, width)
        self.down = nn.ModuleList(nn.Sequential(nn.MaxPool2d(2), block(a, b)) for a, b in pairwise(sizes))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(sizes))
        self.merge = nn.ModuleList(block(2 * a, a) for a in sizes[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for down in self.down:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up, merge, skip in zip(self.up[::-1], self.merge[::-1], maps[::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.head(x)


def block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def discs(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (B, 3, SIDE, SIDE) of a coloured disc on a striped ground, and where the disc is (B, SIDE, SIDE)."""
    row, column = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    centre = torch.randint(16, SIDE - 16, (count, 2, 1, 1), generator=generator)
    radius = torch.randint(8, 16, (count, 1, 1), generator=generator)
    inside = (row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2 < radius**2
    stripes = torch.sin((row + column) / (2 + 4 * torch.rand(count, 1, 1, generator=generator)))
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return torch.where(inside[:, None], colour, stripes[:, None]), inside.long()


def main(steps: int = 60, batch: int = 8) -> None:
    """Pre-train and fine-tune.

    Args:
        steps: of each of the two.
        batch: images in a step.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    unet = UNet()
    # The encoder's maps of strides 4, 8 and 16. The forward ends at the last of them, so that no decoder runs.
    model = sf.SparK(unet, img_size=SIDE, decoder_width=64, feature_layers=["down.1", "down.2", "down.3"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        loss = model(discs(batch, generator)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"pre-training, step {step + 1}: loss {loss.item():.3f}")

    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)  # `unet` is the dense network that it always was
    for step in range(steps):
        images, labels = discs(batch, generator)
        loss = F.cross_entropy(unet(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            print(f"segmentation, step {step + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    tyro.cli(main)
