"""docs/user_models.md and examples/unet.py do what they say; networks as users have them run sparsely, unmodified."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from simulation import Mask, stir
from torch import nn

import spark_fast as sf
from spark_fast.rules import RULES

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "docs" / "user_models.md").read_text()
BLOCKS = re.findall(r"```(\w+)( notest)?\n(.*?)```", GUIDE, re.DOTALL)
TABLE = [
    (name, layers.split(), [int(s) for s in strides.split()])
    for names, layers, strides in re.findall(r"^\| (`\w+`.*?) \| `(.+?)` \| ([\d ]+) \|$", GUIDE, re.MULTILINE)
    for name in re.findall(r"`(\w+)`", names)
]


@pytest.fixture(autouse=True)
def _rules_are_put_back():
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


def example():
    spec = importlib.util.spec_from_file_location("unet", ROOT / "examples" / "unet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_guide_runs_in_order_and_prints_what_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed, names = io.StringIO(), {}
    codes = [code for language, _, code in BLOCKS if language == "python"]
    assert len(codes) == 10 and not any(skipped for _, skipped, _ in BLOCKS)
    with contextlib.redirect_stdout(printed):
        for code in codes:
            exec(compile(code, "user_models.md", "exec"), names)
    said = ["True\n", *(text for language, _, text in BLOCKS if language == "text")]
    assert len(said) == 3 and all(text in printed.getvalue() for text in said), printed.getvalue()
    assert isinstance(names["z"], sf.SparseTensor) and names["z"].features.requires_grad
    assert all(p.grad is not None for p in names["encoder"].parameters())


def test_refusals_read_as_the_guide_says():
    class MyBlock(nn.Module):
        def forward(self, x):
            return torch.cumsum(x, 1)

    x = sf.SparseTensor.from_dense(torch.randn(1, 3, 4, 4), sf.ActivePatches(torch.ones(1, 2, 2, dtype=torch.bool)))
    with pytest.raises(sf.SparseOpError) as caught:
        MyBlock()(x)
    quoted = " ".join(re.search(r"refused by name: `(.+?)`", GUIDE, re.DOTALL).group(1).split())
    assert str(caught.value).startswith(quoted)


@pytest.mark.parametrize(("name", "layers", "strides"), TABLE, ids=[row[0] for row in TABLE])
def test_the_table_of_torchvision_networks(name, layers, strides):
    net = torchvision.models.get_model(name, weights=None)
    model = sf.SparK(net, img_size=64, decoder_width=32, feature_layers=layers)
    assert model.encoder.strides == strides
    model(torch.randn(2, 3, 64, 64)).backward()
    assert sum(p.grad is not None and bool(p.grad.any()) for p in net.parameters()) > 10


def test_the_table_was_found():
    assert len(TABLE) >= 10 and TABLE[0] == ("resnet18", ["layer1", "layer2", "layer3", "layer4"], [4, 8, 16, 32])


def test_the_example_trains(capsys):
    unet = example()
    unet.main(steps=3, batch=2)
    lines = capsys.readouterr().out.splitlines()
    assert [line.rsplit(" ", 1)[0] for line in lines] == [
        f"{part}, step {step}: loss" for part in ("pre-training", "segmentation") for step in (1, 3)
    ]


def test_the_decoder_of_a_unet_is_not_run_in_pre_training():
    net = example().UNet(width=4)
    net.up[-1].register_forward_hook(lambda *_: pytest.fail("the decoder ran"))
    model = sf.SparK(net, img_size=64, decoder_width=32, feature_layers=["down.1", "down.2", "down.3"])
    model(torch.randn(2, 3, 64, 64)).backward()
    assert all(p.grad is None for part in (net.up, net.merge, net.head) for p in part.parameters())
    assert all(p.grad is not None for part in (net.stem, net.down) for p in part.parameters())


# Whole networks, against the dense one whose layers' outputs are masked.


class UpsamplingUNet(nn.Module):
    """Skip connections, upsampling without weights, and the padding with which some U-Nets fit odd sizes."""

    def __init__(self, mode: str):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 4), (4, 8), (12, 5)))
        self.up = nn.Upsample(scale_factor=2, mode=mode, align_corners=None if mode == "nearest" else True)

    def forward(self, x):
        skip = self.a(x).relu_()
        y = self.up(self.b(F.max_pool2d(skip, 2)))
        rows, columns = skip.size()[2] - y.size()[2], skip.size()[3] - y.size()[3]
        y = F.pad(y, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.c(torch.cat([skip, y], dim=1))


class Pooled(nn.Module):
    """A branch that pools the whole image and is spread over it again, as in DeepLab."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.a(x)
        whole = self.b(F.adaptive_avg_pool2d(x, 1) * x.new_ones(()))
        whole = F.interpolate(whole, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return self.c(torch.cat([x, whole], dim=1))


def masked_twin(net: nn.Module, active: torch.Tensor) -> nn.Module:
    mask = Mask(active)
    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, args, out: mask.apply(out))
    return net


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
@pytest.mark.parametrize("name", ["transposed", "nearest", "bilinear"])
def test_a_whole_unet_is_the_masked_dense_one(name):
    def make() -> nn.Module:
        torch.manual_seed(0)
        net = example().UNet(width=4) if name == "transposed" else UpsamplingUNet(name)
        return stir(net).double().eval()

    active = torch.tensor([[[1, 0, 1], [1, 1, 0]], [[0, 1, 0], [0, 0, 0]]], dtype=torch.bool)
    images = Mask(active).apply(torch.randn(2, 3, 32, 48).double())
    net, twin = make(), masked_twin(make(), active)
    out, truth = net(sf.SparseTensor.from_dense(images, sf.ActivePatches(active))), twin(images)
    assert isinstance(out, sf.SparseTensor)
    torch.testing.assert_close(out.to_dense(), truth)
    weight = torch.randn_like(truth)
    mine = torch.autograd.grad((out.to_dense() * weight).sum(), list(net.parameters()))
    theirs = torch.autograd.grad((truth * weight).sum(), list(twin.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_pooled_branch_covers_the_visible_pixels():
    net = stir(Pooled()).double()
    images = torch.randn(2, 3, 8, 16).double()
    active = torch.tensor([[[1, 0]], [[0, 1]]], dtype=torch.bool)
    out = net(sf.SparseTensor.from_dense(images, sf.ActivePatches(active)))
    a = net.a(Mask(active).apply(images))
    halves = torch.stack([a[0, :, :, :8], a[1, :, :, 8:]])
    whole = net.b(halves.mean((2, 3), keepdim=True)).expand(2, 2, 8, 8)
    truth = net.c(torch.cat([halves, whole], 1))
    found = out.to_dense()
    torch.testing.assert_close(torch.stack([found[0, :, :, :8], found[1, :, :, 8:]]), truth)


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_segmentation_networks_without_a_mask(name):
    net = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval().double()
    images = torch.randn(1, 3, 64, 64).double()
    with torch.no_grad():
        out = net(sf.SparseTensor.from_dense(images, sf.ActivePatches(torch.ones(1, 2, 2, dtype=torch.bool))))["out"]
        torch.testing.assert_close(out.to_dense(), net(images)["out"])
