"""The encoder's feature maps: equal to the dense net's without a mask, to the simulation's with one, and no leak.

Also: swapping a net's layers for their sparse siblings and back."""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
from simulation import Mask, Simulation, dense_maps, gap, maps_of, mask_layers, random_mask, stir
from torch import Tensor, nn

import spark_fast as sf

TINY = {
    "resnet26": {"layers": (1, 1, 2, 1), "channels": (8, 16, 24, 32)},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "resnet18d": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},  # average pooling in its shortcuts
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
}
NETS = list(TINY)
SHAPES = [  # image size, patch, channels, batch
    ((224, 224), 32, 3, 2),
    ((96, 160), 32, 3, 3),
    ((128, 192), 64, 3, 2),
    ((64, 96), 32, 1, 2),
    ((96, 64), 32, 5, 1),
    ((32, 64), 32, 3, 1),
]


def build(name: str, size=(96, 96), patch=32, in_chans=3) -> tuple[sf.SparK, Simulation]:
    torch.manual_seed(0)
    spark = sf.SparK(
        name, size, patch_size=patch, in_chans=in_chans, decoder_width=32, stages=4, model_kwargs=TINY[name]
    )
    stir(spark).double()
    backbone = timm.create_model(name, num_classes=0, in_chans=in_chans, **TINY[name])
    norm = "ln" if name.startswith("convnext") else "bn"
    sim = Simulation(backbone, *maps_of(backbone), width=32, norm=norm, in_chans=in_chans)
    return spark, sim.double().copy_from(spark)


def encode(spark: sf.SparK, images: Tensor, active: Tensor) -> list[sf.SparseTensor]:
    return spark.encoder(sf.SparseTensor.from_dense(images, sf.ActivePatches(active)))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_equals_the_dense_net_without_a_mask(name, training):
    spark, sim = build(name)
    backbone = timm.create_model(name, num_classes=0, **TINY[name]).double()
    backbone.load_state_dict(sim.encoder.model.state_dict())
    images = torch.randn(2, 3, 96, 96).double()
    spark.train(training), backbone.train(training)
    truth = dense_maps(backbone, images, sim.names)
    maps = encode(spark, images, torch.ones(2, 3, 3, dtype=torch.bool))
    assert len(maps) == 4
    for ours, theirs in zip(maps, truth, strict=True):
        assert gap(ours.to_dense(), theirs) < 1e-10
    ours, theirs = dict(spark.encoder.model.named_buffers()), dict(backbone.named_buffers())
    assert all(gap(b, theirs[n]) < 1e-10 for n, b in ours.items())


@pytest.mark.parametrize(("size", "patch", "in_chans", "batch"), SHAPES)
@pytest.mark.parametrize("name", NETS)
def test_equals_the_simulation(name, size, patch, in_chans, batch):
    spark, sim = build(name, size, patch, in_chans)
    grid = (size[0] // patch, size[1] // patch)
    active = random_mask(batch, grid, max(1, grid[0] * grid[1] * 2 // 5))
    images = torch.randn(batch, in_chans, *size).double()
    if int(active.sum()) == 1:  # no statistics of one pixel, as in torch
        spark.eval(), sim.eval()
    sparse_images, dense_images = images.clone().requires_grad_(), images.clone().requires_grad_()
    ours, theirs = encode(spark, sparse_images, active), sim.encode(dense_images, active)
    upstream = [torch.randn_like(t) for t in theirs]
    for mine, truth in zip(ours, theirs, strict=True):
        assert mine.shape == truth.shape
        assert gap(mine.to_dense(), truth) < 1e-10
    sum((t.to_dense() * u).sum() for t, u in zip(ours, upstream, strict=True)).backward()
    sum((t * u).sum() for t, u in zip(theirs, upstream, strict=True)).backward()
    assert gap(sparse_images.grad, dense_images.grad) < 1e-9
    truth = dict(sim.named_parameters())
    for key, p in spark.encoder.named_parameters():
        if p.grad is not None:
            assert gap(p.grad, truth[f"encoder.{key}"].grad, 1e-3) < 1e-9, key


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize(("size", "patch", "in_chans", "batch"), SHAPES[:5])
@pytest.mark.parametrize("name", ["resnet26", "resnet18d", "convnext_tiny", "convnext_atto"])
def test_masked_pixels_change_nothing(name, size, patch, in_chans, batch, garbage):
    """Feature maps, gradients of every weight and running statistics are the same bit for bit."""
    spark, _ = build(name, size, patch, in_chans)
    spark.float()
    grid = (size[0] // patch, size[1] // patch)
    active = random_mask(batch, grid, max(1, grid[0] * grid[1] * 2 // 5))
    visible = Mask(active).at(*size, torch.float32).bool()
    images = torch.randn(batch, in_chans, *size)
    results = []
    for pixels in (images, torch.where(visible, images, torch.tensor(garbage))):
        net, pixels = copy.deepcopy(spark), pixels.clone().requires_grad_()
        maps = encode(net, pixels, active)
        sum(t.features.square().sum() for t in maps).backward()
        hidden = pixels.grad[~visible.expand_as(pixels)]
        assert torch.equal(hidden, torch.zeros_like(hidden))  # and no gradient reaches them
        parts = [t.features for t in maps] + [p.grad for p in net.encoder.parameters() if p.grad is not None]
        results.append(parts + [b for _, b in net.named_buffers()] + [pixels.grad])
    assert all(torch.isfinite(t).all() for t in results[0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_leak_test_sees_a_leak():
    """The dense net on the same images does change: the test above can fail."""
    backbone = timm.create_model("resnet26", num_classes=0, **TINY["resnet26"]).eval()
    active = random_mask(1, (3, 3), 4)
    images = torch.randn(1, 3, 96, 96)
    visible = Mask(active).at(96, 96, torch.float32)
    first, second = (dense_maps(backbone, x, ["layer1"])[0] for x in (images, images * visible))
    seen = Mask(active).at(24, 24, torch.float32)
    assert gap(first * seen, second * seen) > 1e-3


def test_masks_of_images_are_independent():
    """Eval mode: an image's maps do not depend on what else is in the batch, nor on its neighbour's mask."""
    spark, _ = build("resnet26")
    spark.eval()
    images, active = torch.randn(3, 3, 96, 96).double(), random_mask(3, (3, 3), 4)
    together = encode(spark, images, active)
    for i in range(3):
        for whole, alone in zip(together, encode(spark, images[i : i + 1], active[i : i + 1]), strict=True):
            assert gap(whole.to_dense()[i], alone.to_dense()[0]) < 1e-12


@pytest.mark.parametrize("name", NETS)
def test_attributes(name):
    spark, sim = build(name, (96, 160))
    assert list(spark.encoder.strides) == [4, 8, 16, 32] and spark.encoder.total_stride == 32
    _, channels, _ = maps_of(timm.create_model(name, num_classes=0, **TINY[name]))
    assert list(spark.encoder.channels) == channels
    keys = set(spark.encoder.model.state_dict())
    assert keys <= set(sim.encoder.model.state_dict())  # timm's names: usable by the dense model as they are


@pytest.mark.parametrize("name", ["resnet26", "convnext_tiny"])
def test_the_weights_are_a_dense_nets(name):
    """After training throw the rest away: timm's model takes the weights, only a classifier may be absent."""
    spark, _ = build(name)
    backbone = timm.create_model(name, num_classes=0, **TINY[name])
    missing, unexpected = backbone.load_state_dict(spark.encoder.model.state_dict(), strict=False)
    assert not unexpected and all(key.startswith(("head.", "fc.")) for key in missing)


def test_the_oracle_is_the_dense_net_without_a_mask():
    for name in NETS:
        backbone = stir(timm.create_model(name, num_classes=0, **TINY[name])).double()
        names, channels, strides = maps_of(backbone)
        sim = Simulation(backbone, names, channels, strides, 32, "none").double()
        images = torch.randn(2, 3, 64, 96).double()
        ours = sim.encode(images, torch.ones(2, 2, 3, dtype=torch.bool))
        for mine, truth in zip(ours, dense_maps(backbone, images, names), strict=True):
            assert gap(mine, truth) < 1e-12
        theirs = dict(backbone.named_buffers())
        assert all(gap(b, theirs[n]) < 1e-12 for n, b in sim.encoder.model.named_buffers())


def net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return stir(timm.create_model(name, num_classes=0, **TINY[name])).double()


def run(model: nn.Module, images: Tensor, names: list[str]) -> list[Tensor]:
    """Dense feature maps and the gradients of their squares, of any of the forms of a net."""
    model.zero_grad()
    maps = dense_maps(model, images, names)
    maps = [m.to_dense() if isinstance(m, sf.SparseTensor) else m for m in maps]
    sum(m.square().sum() for m in maps).backward()
    return [m.detach() for m in maps] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", NETS)
def test_swapping_keeps_everything_but_the_classes(name):
    model = net(name)
    calls = []
    model.get_submodule("layer2" if "resnet" in name else "stages.1").register_forward_hook(lambda *a: calls.append(1))
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    first.register_forward_hook(lambda *a: calls.append(2))
    first.weight.requires_grad_(False)
    classes = [type(m) for m in model.modules()]
    state, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    model.train(False)

    def unchanged() -> None:
        now = model.state_dict()
        assert list(now) == list(state)  # the same names in the same order
        assert all(torch.equal(now[k], state[k]) and now[k].dtype == state[k].dtype for k in state)
        assert all(p is parameters[n] for n, p in model.named_parameters())
        assert not model.training and not first.weight.requires_grad

    assert sf.to_sparse(model) is model
    unchanged()
    swapped = [type(m) for m in model.modules()]
    assert swapped != classes
    for module in model.modules():  # nothing dense is left that has a sparse sibling
        assert type(module) not in (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.LayerNorm)
    sf.to_sparse(model)
    unchanged()
    assert [type(m) for m in model.modules()] == swapped
    calls.clear()
    images, active = torch.randn(2, 3, 64, 96).double(), random_mask(2, (2, 3), 3)
    dense_maps(model, sf.SparseTensor.from_dense(images, sf.ActivePatches(active)), maps_of(model)[0])
    assert calls == [2, 1]  # hooks survive
    assert sf.to_dense(model) is model
    unchanged()
    assert [type(m) for m in model.modules()] == classes
    sf.to_dense(model)
    unchanged()


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [True, False])
def test_unmodified_and_swapped_nets_give_the_same(name, training):
    images, active = torch.randn(2, 3, 64, 96).double(), random_mask(2, (2, 3), 3)
    sparse = sf.SparseTensor.from_dense(images, sf.ActivePatches(active))
    plain = net(name).train(training)
    swapped, sim = sf.to_sparse(copy.deepcopy(plain)), mask_layers(plain, Mask(active)).train(training)
    names, _, _ = maps_of(plain)
    ours, theirs = run(plain, sparse, names), run(swapped, sparse, names)
    truth = run(sim, Mask(active).apply(images), names)
    assert len(ours) == len(theirs) == len(truth)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(gap(a, b, 1e-3) < 1e-9 for a, b in zip(ours, truth, strict=True))
    for n, b in plain.named_buffers():
        assert torch.equal(b, dict(swapped.named_buffers())[n])
        assert gap(b, dict(sim.named_buffers())[n]) < 1e-11


@pytest.mark.parametrize("name", NETS)
def test_a_swapped_net_is_the_dense_net_on_tensors(name):
    plain = net(name).train()
    swapped, images = sf.to_sparse(copy.deepcopy(plain)), torch.randn(2, 3, 64, 96).double()
    names, _, _ = maps_of(plain)
    assert all(torch.equal(a, b) for a, b in zip(run(plain, images, names), run(swapped, images, names), strict=True))


def test_compiled_equals_plain():
    torch.manual_seed(0)
    spark = sf.SparK("resnet10t", img_size=64, decoder_width=32).eval()
    images = torch.randn(2, 3, 64, 64)
    active = spark.random_mask(2)
    compiled = torch.compile(spark, backend="eager")
    torch.testing.assert_close(compiled(images, active), spark(images, active))
    layer = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.MaxPool2d(2)).eval()
    x = sf.SparseTensor.from_dense(images, sf.ActivePatches(active))
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x).features, layer(x).features)


def test_networks_that_are_no_plain_convnets_are_named():
    with pytest.raises(sf.SparseOpError, match="called in VisionTransformer"):
        sf.SparK("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="vit_tiny_patch16_224 does not run on masked images"):
        sf.Encoder("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match="feature_layers: stem, layer9"):
        sf.SparK("resnet18", feature_layers=["stem", "layer9"])
    with pytest.raises(ValueError, match=r"Near it: .*resnet18"):
        sf.SparK("ResNet_18")


def test_the_first_registered_convolution_need_not_be_the_stem():
    class Late(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Conv2d(16, 5, 1)
            self.a, self.b = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Conv2d(8, 16, 2, 2)

        def forward(self, x):
            a = self.a(x)
            return [a, self.b(a)]

    assert sf.SparK(Late(), img_size=64, decoder_width=32).encoder.strides == [4, 8]


@pytest.mark.parametrize(
    ("settings", "error", "word"),
    [
        ({"mask_ratio": 0.1}, ValueError, "hides no patch"),
        ({"mask_ratio": "0.6"}, TypeError, "mask_ratio"),
        ({"img_size": 64.0}, ValueError, "img_size"),
        ({"feature_layers": "layer1"}, TypeError, "feature_layers"),
    ],
)
def test_bad_settings_of_users(settings, error, word):
    with pytest.raises(error, match=word):
        sf.SparK("resnet10t", **{"img_size": 64, "decoder_width": 32, **settings})


def test_images_of_another_dtype_and_raw_masks_are_named():
    spark = sf.SparK("resnet10t", img_size=64, decoder_width=32)
    with pytest.raises(TypeError, match=r"images are torch\.float64"):
        spark(torch.zeros(2, 3, 64, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="ActivePatches"):
        sf.SparseTensor.from_dense(torch.zeros(2, 3, 64, 64), spark.random_mask(2))


def test_the_taps_are_idle_outside_the_encoder():
    """Alone, in a copy, under a second encoder and after a forward that failed, the network is itself."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=0).eval()
    images = torch.randn(2, 3, 64, 64)
    expected, keys = model(images), set(model.state_dict())
    first, second = sf.Encoder(model), sf.Encoder(model, stages=2)
    for run in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(images), expected)
    x = sf.SparseTensor.from_dense(images, sf.ActivePatches(torch.ones(2, 2, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match="conv2d"):
        first(x.with_features(x.features[:, :2]))  # too few channels
    assert torch.equal(model(images), expected) and set(model.state_dict()) == keys
    assert [m.shape for m in copy.deepcopy(second)(x)] == [m.shape for m in first(x)[-2:]]


def test_a_replaced_layer_is_seen():
    encoder = sf.Encoder(timm.create_model("resnet10t", num_classes=0).eval())
    encoder.model.layer4 = copy.deepcopy(encoder.model.layer4)
    encoder.model.layer3 = torch.nn.Sequential(encoder.model.layer3)
    x = sf.SparseTensor.from_dense(torch.randn(1, 3, 32, 32), sf.ActivePatches(torch.ones(1, 1, 1, dtype=torch.bool)))
    assert [m.side for m in encoder(x)] == [8, 4, 2, 1]


def test_threads_that_share_an_encoder_do_not_mix_their_maps():
    """Each waits inside of the network until the other has begun."""
    both, waiting = threading.Barrier(2, timeout=30), threading.local()

    class Meet(nn.Module):
        def forward(self, x):
            if getattr(waiting, "on", False):
                both.wait()
            return x

    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4), Meet(), nn.Conv2d(4, 4, 3, padding=1), Meet(), nn.Conv2d(4, 8, 2, 2))
    encoder = sf.Encoder(model, feature_layers=["0", "2", "4"], stages=2).eval()
    active = random_mask(2, (1, 1), 1)
    images = [sf.SparseTensor.from_dense(torch.randn(2, 3, 8, 8), sf.ActivePatches(active)) for _ in "ab"]
    alone = [encoder(x) for x in images]

    def run(x):
        waiting.on = True
        return encoder(x)

    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(run, images))
    for maps, expected in zip(together, alone, strict=True):
        assert all(torch.equal(m.features, e.features) for m, e in zip(maps, expected, strict=True))


class Own(nn.Module):
    """A network of two maps, after `before` and with `between` after the first."""

    def __init__(self, before=None, between=None, stem=4):
        super().__init__()
        self.before, self.between = before or nn.Identity(), between or nn.Identity()
        self.a, self.b = nn.Conv2d(3, 8, stem, stem), nn.Conv2d(8, 8, 2, 2)

    def forward(self, x):
        a = self.between(self.a(self.before(x)))
        return [a, self.b(a)]


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.values = nn.Parameter(torch.randn(1, 8, 16, 16))

    def forward(self, x):
        return x + self.values


@pytest.mark.filterwarnings("ignore:.*no pixel is skipped")
def test_a_network_that_resizes_its_images_is_refused():
    model = sf.SparK(Own(nn.Upsample((64, 64), mode="bilinear")), img_size=64, decoder_width=32)
    with pytest.raises(ValueError, match=r"its maps have 16x16, 8x8 pixels for images of 64x64"):
        model(torch.randn(2, 3, 64, 64))


def test_a_network_of_a_fixed_size_is_tried_at_the_size_of_the_images():
    model = sf.SparK(Own(between=Positions()), img_size=64, decoder_width=32)
    assert model.encoder.strides == [4, 8] and model(torch.randn(2, 3, 64, 64)).isfinite()


def test_strides_that_are_no_powers_of_two_are_resized_with_a_warning():
    with pytest.warns(UserWarning, match=r"strides of about 3\.01, 6\.02; they are resized to strides \[4, 8\]"):
        model = sf.SparK(Own(stem=3), img_size=96, decoder_width=32)
    assert model(torch.randn(2, 3, 96, 96)).isfinite()


def test_valid_padding_is_resized_silently():
    import torchvision

    net = torchvision.models.inception_v3(weights=None, aux_logits=False, init_weights=False)
    layers = ["Conv2d_4a_3x3", "Mixed_5d", "Mixed_6e", "Mixed_7c"]
    assert sf.Encoder(net, feature_layers=layers).strides == [4, 8, 16, 32]
