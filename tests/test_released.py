"""Files of SparK's released code: written by an independent module tree with the released names, loaded, compared."""

import itertools

import pytest
import timm
import torch
from simulation import (
    Decoder,
    Mask,
    batch_norm,
    dense_maps,
    gap,
    layer_norm,
    maps_of,
    mask_layers,
    patch_loss,
    patchify,
    random_mask,
    stir,
    unpatchify,
)
from torch import Tensor, nn

import spark_fast as sf
from spark_fast.released import load_released, save_released

WIDTH, SIZE, GRID = 32, 64, (2, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps, torch.ones_like(x[:, :1]))


class OriginalBlock(nn.Module):
    """A ConvNeXt block with the original repository's names; the mlp is two Linear layers."""

    def __init__(self, dim: int):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.dwconv(x).permute(0, 2, 3, 1)
        y = self.gamma * self.pwconv2(nn.functional.gelu(self.pwconv1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class OriginalConvNeXt(nn.Module):
    def __init__(self, depths: list[int], dims: list[int], in_chans: int = 3):
        super().__init__()
        steps = [nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4), ChannelNorm(dims[0]))]
        for a, b in itertools.pairwise(dims):
            steps.append(nn.Sequential(ChannelNorm(a), nn.Conv2d(a, b, 2, stride=2)))
        self.downsample_layers = nn.ModuleList(steps)
        self.stages = nn.ModuleList(
            nn.Sequential(*(OriginalBlock(c) for _ in range(d))) for d, c in zip(depths, dims, strict=True)
        )

    def maps(self, x: Tensor, mask: Mask) -> list[Tensor]:
        """Zero-filled maps, finest first; every block's output is masked, and so is what each convolution reads."""
        out = []
        x = mask.apply(x)
        for step, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = mask.apply(step(x))
            for block in stage:
                x = mask.apply(block(x))
            out.append(x)
        return out


class ReleasedSparK(nn.Module):
    """The module tree whose state dict the released code writes."""

    def __init__(self, backbone: nn.Module, channels: list[int], norm: str, in_chans: int = 3, size: int = SIZE):
        super().__init__()
        self.norm, self.mask = norm, Mask(torch.ones(1, 1, 1, dtype=torch.bool))
        self.sparse_encoder = nn.Module()
        original = isinstance(backbone, OriginalConvNeXt)
        self.sparse_encoder.sp_cnn = backbone if original else mask_layers(backbone, self.mask)
        self.dense_decoder = Decoder(WIDTH, 5, in_chans)
        make = {"bn": nn.BatchNorm2d, "ln": ChannelNorm, "none": lambda c: nn.Identity()}[norm]
        self.densify_norms = nn.ModuleList(make(c) for c in channels[::-1])
        self.densify_projs = nn.ModuleList()
        self.mask_tokens = nn.ParameterList(nn.Parameter(torch.zeros(1, c, 1, 1)) for c in channels[::-1])
        for i, c in enumerate(channels[::-1]):
            same = i == 0 and c == WIDTH
            kernel = 3 if i else 1
            self.densify_projs.append(nn.Identity() if same else nn.Conv2d(c, WIDTH >> i, kernel, padding=kernel // 2))
        self.register_buffer("imn_m", torch.empty(1, 3, 1, 1))
        self.register_buffer("imn_s", torch.empty(1, 3, 1, 1))
        self.register_buffer("norm_black", torch.zeros(1, 3, size, size))

    def predict(self, images: Tensor, active: Tensor) -> Tensor:
        self.mask.grid = active
        net = self.sparse_encoder.sp_cnn
        if isinstance(net, OriginalConvNeXt):
            maps = net.maps(images, self.mask)
        else:
            maps = dense_maps(net, self.mask.apply(images), maps_of(net)[0])
        filled = {}
        for i, x in enumerate(maps[: -1 - len(self.mask_tokens) : -1]):
            seen = self.mask.at(*x.shape[2:], x.dtype)
            x = batch_norm(self.densify_norms[i], x, seen) if self.norm == "bn" else self.densify_norms[i](x)
            filled[i] = self.densify_projs[i](x * seen + self.mask_tokens[i] * (1 - seen))
        return self.dense_decoder(filled)

    def forward(self, images: Tensor, active: Tensor) -> Tensor:
        return patch_loss(images, self.predict(images, active), active)

    def file(self, arch: str) -> dict:
        state = dict(self.state_dict())
        state["config"] = {
            "mask_ratio": 0.5, "densify_norm_str": self.norm, "sbn": True, "hierarchy": len(self.mask_tokens),
            "sparse_encoder.input_size": SIZE, "dense_decoder.width": WIDTH,
        }  # fmt: skip
        return {
            "args": "Args(bs=4096)", "input_size": SIZE, "arch": arch, "epoch": 1599, "performance_desc": "0.31",
            "module": state, "optimizer": {"state": {0: {"step": 3}}, "param_groups": []}, "is_pretrain": True,
        }  # fmt: skip


def released(arch: str, norm: str | None = None, stages: int = 4, in_chans: int = 3) -> ReleasedSparK:
    torch.manual_seed(0)
    net = timm.create_model(arch, num_classes=0, in_chans=in_chans)
    _, channels, _ = maps_of(net)
    if arch.startswith("convnext"):
        net = OriginalConvNeXt([len(s.blocks) for s in net.stages], channels, in_chans)
    norm = norm or ("ln" if arch.startswith("convnext") else "bn")
    return stir(ReleasedSparK(net, channels[4 - stages :], norm, in_chans))


def agree(spark: sf.SparK, truth: ReleasedSparK) -> None:
    """Loss in train and eval mode, and the reconstruction, in float64."""
    images = 2 + torch.randn(2, spark.in_chans, SIZE, SIZE).double()
    active = random_mask(2, GRID, 2)
    spark.double(), truth.double()
    with torch.no_grad():
        for training in (False, True):
            spark.train(training), truth.train(training)
            assert float(spark(images, active)) == pytest.approx(float(truth(images, active)), rel=1e-9)
        result = spark.reconstruct(images, active)
        patches, guess = patchify(images, GRID), patchify(truth.eval().predict(images, active), GRID)
    guess = guess * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    wanted = unpatchify(torch.where(active[..., None], patches, guess), images.shape)
    assert gap(result, wanted) < 1e-8


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("resnet18", {}),
        ("resnet26", {}),
        ("convnext_tiny", {}),  # timm's mlp is linear there too
        ("convnext_atto", {}),  # timm's mlp is made of 1x1 convolutions
        ("resnet18", {"stages": 2, "norm": "none"}),
        ("resnet18", {"norm": "ln", "in_chans": 1}),
        ("convnext_atto", {"norm": "bn", "in_chans": 4}),
    ],
    ids=str,
)
def test_spark_style(tmp_path, arch, options):
    truth = released(arch, **options)
    torch.save(truth.file(arch), tmp_path / "x.pth")
    spark = load_released(tmp_path / "x.pth")
    assert tuple(spark.img_size) == (SIZE, SIZE) and spark.mask_ratio == 0.5 and spark.training
    assert spark.in_chans == options.get("in_chans", 3)
    assert len(spark.densify.mask_tokens) == options.get("stages", 4)
    agree(spark, truth)


def test_it_is_exported_and_takes_the_architecture_by_name(tmp_path):
    truth = released("resnet18")
    content = truth.file("resnet18")
    del content["arch"]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="model="):
        sf.load_released(tmp_path / "x.pth")
    agree(sf.load_released(str(tmp_path / "x.pth"), model="resnet18"), truth)


def test_image_size_from_the_unused_buffer(tmp_path):
    """Of any shape: files of others have no entry `input_size`."""
    truth = released("resnet18")
    content = truth.file("resnet18")
    del content["module"]["config"], content["input_size"]
    content["module"]["norm_black"] = torch.zeros(1, 3, 96, 64)
    torch.save(content, tmp_path / "x.pth")
    assert tuple(load_released(tmp_path / "x.pth").img_size) == (96, 64)
    del content["module"]["norm_black"]
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="input_size"):
        load_released(tmp_path / "x.pth")


@pytest.mark.parametrize(
    ("arch", "wrapper"),
    [("resnet18", None), ("resnet18", "module"), ("resnet18", "state_dict"), ("resnet18", "model"), ("resnet18", "ddp"),
     ("convnext_atto", "module"), ("convnext_tiny", None)],
)  # fmt: skip
def test_backbone_only(tmp_path, arch, wrapper):
    net = released(arch).sparse_encoder.sp_cnn
    state = dict(net.state_dict())
    content = {"ddp": {f"module.{k}": v for k, v in state.items()}, None: state}.get(wrapper, {wrapper: state})
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="model="):
        load_released(tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="freshly initialised"):
        spark = load_released(tmp_path / "x.pth", model=arch)
    images = torch.randn(2, 3, 224, 224)
    active = random_mask(2, (7, 7), 20)
    spark.eval(), net.eval()
    with torch.no_grad():
        ours = spark.encoder(sf.SparseTensor.from_dense(images, sf.ActivePatches(active)))
        if isinstance(net, OriginalConvNeXt):
            truth = net.maps(images, Mask(active))
        else:
            sim = mask_layers(timm.create_model(arch, num_classes=0), mask := Mask(active)).eval()
            sim.load_state_dict(net.state_dict())
            truth = dense_maps(sim, mask.apply(images), maps_of(sim)[0])
    assert all(gap(o.to_dense(), t) < 1e-5 for o, t in zip(ours, truth, strict=True))


def test_a_classifier_in_the_file_is_ignored(tmp_path):
    torch.save(timm.create_model("resnet18", in_chans=1).state_dict(), tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="freshly"):
        assert load_released(tmp_path / "x.pth", model="resnet18").in_chans == 1


def test_a_contradicting_name(tmp_path):
    torch.save(released("resnet18").file("resnet18"), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"model='resnet50'.*arch='resnet18'"):
        load_released(tmp_path / "x.pth", model="resnet50")
    load_released(tmp_path / "x.pth", model="resnet18.a1_in1k")


def test_all_differing_keys_in_one_message(tmp_path):
    content = released("resnet18").file("resnet18")
    state = content["module"]
    del state["sparse_encoder.sp_cnn.bn1.weight"], state["densify_projs.1.bias"]
    state["sparse_encoder.sp_cnn.extra.weight"] = torch.zeros(2)
    state["surprise"] = torch.zeros(2)
    state["dense_decoder.dec.2.conv.0.weight"] = torch.zeros(1, 2, 3, 3)
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError) as caught:
        load_released(tmp_path / "x.pth")
    message = str(caught.value)
    for name in (
        "encoder.model.bn1.weight", "densify.projs.1.bias", "encoder.model.extra.weight", "surprise",
        "decoder.dec.2.conv.0.weight is (1, 2, 3, 3) in the file, (8, 8, 3, 3)", "missing from the file (2)",
        "unexpected in the file (2)", "resnet18", "x.pth",
    ):  # fmt: skip
        assert name in message


@pytest.mark.parametrize(("arch", "model"), [("resnet18", "resnet50"), ("convnext_atto", "convnext_tiny"),
                                             ("convnext_atto", "resnet18"), ("resnet18", "convnext_atto")])  # fmt: skip
def test_a_backbone_of_another_architecture(tmp_path, arch, model):
    torch.save(released(arch).sparse_encoder.sp_cnn.state_dict(), tmp_path / "x.pth")
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"does not fit {model}"):
        load_released(tmp_path / "x.pth", model=model)


def test_unreadable_files(tmp_path):
    good = tmp_path / "good.pth"
    torch.save(released("resnet18").file("resnet18"), good)
    broken = {
        "cut.pth": good.read_bytes()[:100_000],
        "empty.pth": b"",
        "text.pth": b"<html>not found</html>",
        "zeros.pth": bytes(1000),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=name):
            load_released(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_released(tmp_path / "nowhere.pth")
    with pytest.raises(FileNotFoundError):
        load_released(tmp_path)
    with pytest.raises(TypeError, match="model"):
        load_released(good, model=3)


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self):
        return print, ("unpickled",)


@pytest.mark.parametrize("content", [[1, 2], {}, {"module": {}}, {"a": 3}, torch.zeros(3), {"module": 3}, Trap()])
def test_files_that_hold_something_else(tmp_path, content, capsys):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="path="):
        load_released(tmp_path / "x.pth", model="resnet18")
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize("arch", ["resnet18", "convnext_atto"])
def test_written_files_are_the_released_codes(tmp_path, arch):
    """What we write has the names and shapes that the released module tree loads, and reads back unchanged."""
    truth = released(arch)
    torch.save(truth.file(arch), tmp_path / "a.pth")
    spark = load_released(tmp_path / "a.pth")
    save_released(spark, tmp_path / "b.pth", epoch=7)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pth", "b.pth"]
    content = torch.load(tmp_path / "b.pth", weights_only=True)
    assert content["arch"] == arch and content["input_size"] == SIZE and content["epoch"] == 7
    state = dict(content["module"])
    assert state.pop("config") == {**truth.file(arch)["module"]["config"], "sbn": False}
    fresh = released(arch)
    fresh.load_state_dict(state, strict=True)
    unused = ("imn_m", "imn_s")  # uninitialised memory in the released code
    before = {k: v for k, v in truth.state_dict().items() if k not in unused}
    assert all(torch.equal(fresh.state_dict()[k], v) for k, v in before.items())
    again = load_released(tmp_path / "b.pth")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in spark.state_dict().items() if ".head." not in k)


def test_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="patch_size"):
        save_released(sf.SparK("resnet18", 128, patch_size=64, decoder_width=32), tmp_path / "x.pth")
    with pytest.raises(ValueError, match="backbone"):
        save_released(sf.SparK("vgg11_bn", 64, decoder_width=32), tmp_path / "x.pth")
    spark = sf.SparK("resnet18", (64, 96), decoder_width=32)
    with pytest.raises(FileNotFoundError):
        save_released(spark, tmp_path / "missing" / "x.pth")
    save_released(spark, tmp_path / "x.pth")
    assert tuple(load_released(tmp_path / "x.pth").img_size) == (64, 96)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
