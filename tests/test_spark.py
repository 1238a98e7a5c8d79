"""SparK end to end against the dense-masked simulation: loss, every gradient, running statistics, reconstruction."""

import copy
import statistics

import pytest
import timm
import torch
from simulation import Simulation, gap, gradients, maps_of, random_mask, stir
from torch import Tensor, nn

import spark_fast as sf

TINY = {
    "resnet26": {"layers": (1, 1, 2, 1), "channels": (8, 16, 24, 32)},
    "resnet18": {"layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 64)},
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},  # norm and mlp channels first
}


def pair(name: str, img_size=224, stages=4, width=768, in_chans=3, kwargs=None, norm=None, **options):
    """A stirred SparK and the simulation with the same parameters."""
    torch.manual_seed(0)
    kwargs = kwargs or {}
    if norm is not None:
        options["densify_norm"] = norm
    spark = sf.SparK(
        name, img_size, decoder_width=width, in_chans=in_chans, stages=stages, model_kwargs=kwargs, **options
    )
    stir(spark)
    backbone = timm.create_model(name, num_classes=0, in_chans=in_chans, **kwargs)
    norm = norm or ("bn" if name.startswith("resnet") else "ln")
    sim = Simulation(backbone, *maps_of(backbone, stages), width=width, norm=norm, in_chans=in_chans)
    return spark, sim.copy_from(spark)


def outcome(model: nn.Module, images: Tensor, active: Tensor, dtype: torch.dtype):
    """Loss, gradients and buffers after one step in train mode; the model itself is left alone."""
    model = copy.deepcopy(model).to(dtype).train()
    loss = model(images.to(dtype), active)
    assert loss.dim() == 0
    loss.backward()
    buffers = {n: b for n, b in model.named_buffers() if n.rsplit(".", 1)[-1].startswith(("running_", "num_batches"))}
    return float(loss.detach()), gradients(model), buffers


def assert_same(ours, truth, tolerance: float) -> None:
    """Gradients are compared norm-wise per parameter; one that is zero up to rounding is compared to a floor."""
    assert ours[0] == pytest.approx(truth[0], rel=tolerance)
    errors = [gradient_errors(ours, truth), {n: gap(b, truth[2][n]) for n, b in ours[2].items()}]
    for found, true_part in zip(errors, truth[1:], strict=True):
        assert len(found) >= len(true_part) - 4  # a classifier head of the simulation's backbone has no partner
        assert all(e <= tolerance for e in found.values()), {n: e for n, e in found.items() if not e <= tolerance}


def gradient_errors(ours, truth) -> dict[str, float]:
    floor = 1e-5 * max(float(g.double().norm()) for g in truth[1].values())
    return {n: gap(g, truth[1][n], floor) for n, g in ours[1].items() if n in truth[1]}


class Gate(nn.Module):
    """ReLU or ReLU6 with its decisions given: which pixels pass, and which are cut off at 6."""

    def __init__(self, passes: Tensor, saturated: Tensor | None):
        super().__init__()
        self.passes, self.saturated = passes, saturated

    def forward(self, x):
        y = x * self.passes.to(x.dtype)
        return y if self.saturated is None else y + 6 * self.saturated.to(x.dtype)


def noting_decisions(model: nn.Module) -> tuple[dict[str, Gate], list]:
    """Fills the dict with what every ReLU of `model` decides in its next forward pass; and the hooks to remove."""
    gates: dict[str, Gate] = {}

    def note(layer: nn.Module, args: tuple, name: str) -> None:
        x, six = args[0].detach(), isinstance(layer, nn.ReLU6)
        gates[name] = Gate((x > 0) & (x < 6) if six else x > 0, x >= 6 if six else None)

    hooks = [
        layer.register_forward_pre_hook(lambda m, args, name=name: note(m, args, name))
        for name, layer in model.named_modules()
        if isinstance(layer, nn.ReLU | nn.ReLU6)
    ]
    return gates, hooks


def with_gates(model: nn.Module, gates: dict[str, Gate]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, gate in gates.items():
        assert isinstance(model.get_submodule(name), nn.ReLU | nn.ReLU6)
        model.set_submodule(name, gate)
    return model


@pytest.fixture(scope="module", params=["resnet50", "convnext_tiny"])
def full_size(request):
    """The real nets at 224 px, batch 4: ours, the simulation, its float64 outcome, and its ReLUs' decisions in that."""
    spark, sim = pair(request.param)
    images, active = torch.randn(4, 3, 224, 224), random_mask(4, (7, 7), 20)
    gates, hooks = noting_decisions(sim)
    truth = outcome(sim, images, active, torch.float64)
    for hook in hooks:
        hook.remove()
    return spark, sim, images, active, truth, gates


@pytest.mark.slow
def test_full_size_float64(full_size):
    spark, _, images, active, truth, _ = full_size
    assert_same(outcome(spark, images, active, torch.float64), truth, 1e-9)


@pytest.mark.slow
def test_full_size_float32(full_size):
    """Loss and running statistics of the nets as they are."""
    spark, sim, images, active, truth, _ = full_size
    ours, simulated = (outcome(model, images, active, torch.float32) for model in (spark, sim))
    assert ours[0] == pytest.approx(truth[0], rel=1e-5)
    for name, value in ours[2].items():
        assert gap(value, truth[2][name]) <= 2 * gap(simulated[2][name], truth[2][name]) + 1e-5


@pytest.mark.slow
def test_full_size_float32_gradients(full_size):
    """No gradient is off by more than twice the simulation's own float32 error + 1e-4, ReLUs deciding as in float64.

    Left to decide for themselves, ReLUs flip where rounding carries a pixel over the kink. Each flip is a jump in the
    gradient: the simulation's float32 gradients are then off its own float64 ones by 1e-2, by chance, and a bound
    derived from that would hide real errors. With the decisions given, the same nets agree to 1e-4. Both run the dense
    part channels-last: there PyTorch sums a batch norm's gradient over 200,000 pixels 30 times less exactly.
    """
    spark, sim, images, active, truth, gates = full_size
    assert len(gates) in (5 + 49, 5)  # one in each block of the decoder, and those of ResNet-50
    models = (with_gates(m, gates).to(memory_format=torch.channels_last) for m in (spark, sim))
    ours, simulated = (outcome(m, images, active, torch.float32) for m in models)
    error, noise = (gradient_errors(part, truth) for part in (ours, simulated))
    assert statistics.median(noise.values()) < 1e-4  # or the bound would say little
    excess = {n: (e, noise[n]) for n, e in error.items() if not e <= 2 * noise[n] + 1e-4}
    assert not excess


SMALL = [
    ("resnet26", (96, 96), {}),
    ("resnet18", (64, 96), {}),
    ("convnext_tiny", (96, 64), {}),
    ("convnext_atto", (96, 96), {}),
    ("resnet26", (128, 192), {"patch_size": 64}),
    ("convnext_tiny", (192, 128), {"patch_size": 64}),
    ("resnet26", (96, 64), {"in_chans": 1}),
    ("convnext_tiny", (64, 96), {"in_chans": 5}),
    ("resnet18", (96, 96), {"stages": 1}),
    ("resnet26", (96, 96), {"stages": 2}),
    ("convnext_tiny", (96, 96), {"stages": 3}),
    ("resnet18", (96, 96), {"norm": "none"}),
    ("resnet18", (96, 96), {"norm": "ln"}),
    ("convnext_atto", (96, 96), {"norm": "bn"}),
    ("resnet18", (96, 96), {"width": 128}),  # the coarsest map's width: no projection there
    ("convnext_tiny", (96, 96), {"width": 32}),
]


@pytest.mark.parametrize(("name", "size", "options"), SMALL, ids=lambda v: str(v))
@pytest.mark.parametrize("batch", [1, 3])
def test_small_float64(name, size, options, batch):
    spark, sim = pair(name, size, kwargs=TINY[name], **{"width": 64, **options})
    patch = options.get("patch_size", 32)
    grid = (size[0] // patch, size[1] // patch)
    assert tuple(spark.grid) == grid
    images = torch.randn(batch, spark.in_chans, *size)
    active = random_mask(batch, grid, spark.len_keep)
    truth = outcome(sim, images, active, torch.float64)
    assert_same(outcome(spark, images, active, torch.float64), truth, 1e-9)


@pytest.mark.parametrize("name", ["resnet26", "convnext_tiny"])
def test_unequal_counts(name):
    """A mask of the user's may keep a different number of patches in each image, even none."""
    spark, sim = pair(name, 96, kwargs=TINY[name], width=64)
    active = torch.zeros(3, 3, 3, dtype=torch.bool)
    active[0, :2], active[1, 1, 1] = True, True
    images = torch.randn(3, 3, 96, 96)
    truth = outcome(sim, images, active, torch.float64)
    assert_same(outcome(spark, images, active, torch.float64), truth, 1e-9)


@pytest.mark.parametrize("name", ["resnet26", "convnext_tiny"])
def test_drop_path(name):
    """Whole images drop out of a branch: with the same random numbers the same ones in both."""
    kwargs = {**TINY[name], "drop_path_rate": 0.5}
    spark, _ = pair(name, 96, kwargs=TINY[name], width=64, drop_path_rate=0.5)
    _, sim = pair(name, 96, kwargs=kwargs, width=64)
    images, active = torch.randn(4, 3, 96, 96), random_mask(4, (3, 3), 4)
    torch.manual_seed(5)
    truth = outcome(sim, images, active, torch.float64)
    torch.manual_seed(5)
    assert_same(outcome(spark, images, active, torch.float64), truth, 1e-9)
    assert outcome(spark, images, active, torch.float64)[0] != pytest.approx(truth[0], rel=1e-6)


@pytest.mark.parametrize("name", ["convnext_tiny", "convnext_atto"])
def test_activation_checkpointing(name):
    """Recomputing the stages in the backward pass changes no gradient."""
    spark, sim = pair(name, 96, kwargs=TINY[name], width=64)
    spark.encoder.model.set_grad_checkpointing(True)
    images, active = torch.randn(2, 3, 96, 96), random_mask(2, (3, 3), 4)
    truth = outcome(sim, images, active, torch.float64)
    assert_same(outcome(spark, images, active, torch.float64), truth, 1e-9)


@pytest.mark.parametrize("name", ["resnet26", "convnext_tiny", "convnext_atto"])
@pytest.mark.parametrize("layout", ["channels last", "transposed", "every second pixel", "expanded"])
def test_memory_layouts(name, layout):
    """Images and weights of any strides give what contiguous ones give."""
    spark, sim = pair(name, 96, kwargs=TINY[name], width=64)
    active = random_mask(2, (3, 3), 4)
    images = {
        "channels last": torch.randn(2, 3, 96, 96).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(96, 96, 3, 2).permute(3, 2, 1, 0),
        "every second pixel": torch.randn(2, 5, 192, 192)[:, 1:4, ::2, 1::2],
        "expanded": torch.randn(2, 1, 96, 96).expand(2, 3, 96, 96),
    }[layout]
    truth = outcome(sim, images.contiguous(), active, torch.float64)
    if layout == "channels last":
        spark.to(memory_format=torch.channels_last)
    assert_same(outcome(spark, images, active, torch.float64), truth, 1e-9)


@pytest.mark.parametrize("name", ["resnet26", "convnext_tiny"])
def test_eval_mode(name):
    spark, sim = pair(name, 96, kwargs=TINY[name], width=64)
    images, active = torch.randn(2, 3, 96, 96).double(), random_mask(2, (3, 3), 4)
    spark.double().eval(), sim.double().eval()
    with torch.no_grad():
        assert float(spark(images, active)) == pytest.approx(float(sim(images, active)), rel=1e-9)


@pytest.mark.parametrize("name", ["resnet26", "convnext_tiny"])
@pytest.mark.parametrize("training", [True, False])
def test_reconstruct(name, training):
    spark, sim = pair(name, (96, 64), kwargs=TINY[name], width=64)
    images, active = 5 * torch.rand(2, 3, 96, 64).double(), random_mask(2, (3, 2), 2)
    spark.double().train(training), sim.double()
    before = {n: v.clone() for n, v in spark.state_dict().items()}
    result = spark.reconstruct(images, active)
    assert gap(result, sim.reconstruct(images, active)) < 1e-9
    assert spark.training is training and not result.requires_grad
    assert all(torch.equal(v, before[n]) for n, v in spark.state_dict().items())
    visible = active.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None].expand_as(images)
    assert torch.equal(result[visible], images[visible])


def test_a_fresh_net_starts_near_one():
    torch.manual_seed(0)
    loss = sf.SparK("resnet26", 96, model_kwargs=TINY["resnet26"], decoder_width=64)(torch.randn(4, 3, 96, 96))
    assert 0.8 < float(loss.detach()) < 1.5


def test_the_mask_is_drawn_from_the_global_generator():
    spark, _ = pair("resnet18", 96, kwargs=TINY["resnet18"], width=64)
    images = torch.randn(2, 3, 96, 96)
    torch.manual_seed(3)
    first = spark(images)
    torch.manual_seed(3)
    active = spark.random_mask(2)
    assert active.shape == (2, 3, 3) and active.dtype == torch.bool
    assert (active.sum((1, 2)) == spark.len_keep).all() and spark.len_keep == 4
    assert torch.equal(first, spark(images, active))
    assert not torch.equal(first, spark(images))


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"img_size": 100}, "img_size"),
        ({"img_size": (96, 100)}, "img_size"),
        ({"img_size": 96, "patch_size": 16}, "patch_size"),
        ({"img_size": 96, "patch_size": 48}, "patch_size"),
        ({"img_size": 96, "patch_size": 64}, "patch_size"),
        ({"img_size": 96, "mask_ratio": 1.0}, "mask_ratio"),
        ({"img_size": 96, "mask_ratio": -0.1}, "mask_ratio"),
        ({"img_size": 96, "mask_ratio": (0.5, 0.4)}, "mask_ratio"),
        ({"img_size": 96, "mask_ratio": (-0.5, 0.4)}, "mask_ratio"),
        ({"img_size": 96, "mask_ratio": (0.5, 0.99)}, "mask_ratio"),
        ({"img_size": 96, "mask_ratio": (0.5,)}, "mask_ratio"),
        ({"img_size": 96, "mask": "blocks"}, "mask='blocks'"),
        ({"img_size": 96, "mask": None}, "mask must be"),
        ({"img_size": 96, "mask": torch.zeros(3, 3, dtype=torch.bool)}, "mask as a tensor"),
        ({"img_size": 96, "stages": 0}, "stages"),
        ({"img_size": 96, "stages": 9}, "stages"),
        ({"img_size": 96, "decoder_width": 33}, "decoder_width"),
        ({"img_size": 96, "densify_norm": "gn"}, "densify_norm"),
        ({"img_size": 96, "model": "no_such_net"}, "no_such_net"),
    ],
    ids=str,
)
def test_bad_settings(options, word):
    arguments = {"model": "resnet18", "model_kwargs": TINY["resnet18"], **options}
    with pytest.raises((ValueError, TypeError), match=word):
        sf.SparK(**arguments)


IMAGES, ACTIVE = torch.zeros(2, 3, 96, 96), torch.eye(3, dtype=torch.bool).expand(2, 3, 3)


@pytest.mark.parametrize(
    ("images", "active", "word"),
    [
        (torch.zeros(2, 4, 96, 96), ACTIVE, "images"),
        (torch.zeros(2, 3, 96, 64), ACTIVE, "images"),
        (torch.zeros(2, 3, 100, 96), ACTIVE, "images"),
        (torch.zeros(3, 96, 96), ACTIVE, "images"),
        (torch.zeros(2, 3, 96, 96, dtype=torch.uint8), ACTIVE, "images"),
        (IMAGES.to("meta"), None, "images are on meta"),
        ([[0.0]], ACTIVE, "images"),
        (IMAGES, ACTIVE[:, None], "active"),
        (IMAGES, ACTIVE[:1], "active"),
        (IMAGES, ACTIVE[:, :2], "active"),
        (IMAGES, ACTIVE.float(), "active"),
        (IMAGES, ACTIVE.int(), "active"),
        (IMAGES, ACTIVE.to("meta"), "active"),
        (IMAGES, ACTIVE.tolist(), "active"),
    ],
    ids=lambda v: f"{v.dtype}{tuple(v.shape)}{v.device}" if isinstance(v, Tensor) else type(v).__name__,
)
@pytest.mark.parametrize("call", ["forward", "reconstruct"])
def test_bad_inputs(images, active, word, call):
    spark = sf.SparK("resnet18", 96, model_kwargs=TINY["resnet18"], decoder_width=32)
    with pytest.raises((ValueError, TypeError), match=word):
        getattr(spark, call)(images, active)


def test_nothing_to_predict_is_refused_or_zero():
    """With every patch visible the loss has no terms: a mean over nothing must not come back as NaN."""
    spark = sf.SparK("resnet18", 96, model_kwargs=TINY["resnet18"], decoder_width=32)
    try:
        loss = spark(IMAGES, torch.ones(2, 3, 3, dtype=torch.bool))
    except ValueError as error:
        assert "active" in str(error)
    else:
        assert float(loss.detach()) == 0


SMALLEST = {"model": "resnet18", "img_size": (96, 128), "decoder_width": 32, "model_kwargs": TINY["resnet18"]}


@pytest.fixture
def _one_thread():
    """Steps of this size gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("mask", ["random", "block", "grid", "mesh", torch.eye(3) > 0])
@pytest.mark.parametrize("ratio", [0.6, (0.4, 0.8)])
def test_the_loss_falls_under_every_kind_of_mask(mask, ratio):
    spark = sf.SparK("test_resnet", 96, decoder_width=32, mask=mask, mask_ratio=ratio).train()
    y, x = torch.meshgrid(torch.linspace(0, 9, 96), torch.linspace(0, 9, 96), indexing="ij")
    images = torch.stack([torch.stack([(a * x + c * y).sin() for c in (0.3, 1, 2)]) for a in (1, 0.5)])
    optimizer, losses = torch.optim.Adam(spark.parameters(), 3e-3), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = spark(images)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert statistics.mean(losses[-4:]) < statistics.mean(losses[:4]) - 0.03


@pytest.mark.parametrize("mask", ["random", "block", "grid", "mesh"])
def test_masks_of_the_kind_and_the_ratio(mask):
    spark = sf.SparK(**SMALLEST, mask=mask, mask_ratio=0.5)
    direct = getattr(sf, f"{mask}_patch_mask")
    images = torch.randn(2, 3, 96, 128)
    torch.manual_seed(3)
    first = spark(images)
    torch.manual_seed(3)
    active = direct(2, (3, 4), 0.5)
    assert spark.len_keep == 6 and torch.equal(first, spark(images, active))
    given = [torch.Generator().manual_seed(1) for _ in "12"]
    ratios = torch.tensor([0.25, 0.75])
    active = spark.random_mask(2, given[0], mask_ratio=ratios)
    assert torch.equal(active, direct(2, (3, 4), ratios, given[1])) and active.sum((1, 2)).tolist() == [9, 3]


def test_ratios_drawn_per_image():
    """Counts differ from image to image; forward draws what random_mask draws."""
    spark = sf.SparK(**SMALLEST, mask_ratio=(0.25, 0.75))
    assert spark.len_keep is None and "mask_ratio=(0.25, 0.75)" in repr(spark)
    images = torch.randn(8, 3, 96, 128)
    torch.manual_seed(3)
    first = spark(images)
    torch.manual_seed(3)
    active = spark.random_mask(8)
    kept = active.sum((1, 2)).tolist()
    assert len(set(kept)) > 2 and all(3 <= k <= 9 for k in kept)
    assert torch.equal(first, spark(images, active))


def test_another_ratio():
    spark = sf.SparK(**SMALLEST, mask_ratio=0.5)
    spark.set_mask_ratio(0.75)
    assert (spark.mask_ratio, spark.len_keep) == (0.75, 3)
    assert spark.random_mask(2).sum((1, 2)).tolist() == [3, 3]
    assert float(spark(torch.randn(2, 3, 96, 128)).detach()) > 0
    for ratio, word in [(0.01, "hides no patch"), (0.99, "no visible patch"), ((0.0, 0.01), "hides no patch")]:
        with pytest.raises(ValueError, match=word):
            spark.set_mask_ratio(ratio)
    assert (spark.mask_ratio, spark.len_keep) == (0.75, 3)


def test_a_mask_for_every_image():
    chosen = torch.eye(3, 4, dtype=torch.bool)
    spark = sf.SparK(**SMALLEST, mask=chosen)
    assert (spark.mask_ratio, spark.len_keep) == (0.75, 3)
    assert torch.equal(spark.random_mask(2), chosen.expand(2, 3, 4))
    assert not [name for name in spark.state_dict() if "mask." in name and "mask_token" not in name]
    images = torch.randn(2, 3, 96, 128)
    assert torch.equal(spark(images), spark(images, chosen.expand(2, 3, 4)))
    visible = chosen.repeat_interleave(32, 0).repeat_interleave(32, 1).expand_as(images)
    assert torch.equal(spark.reconstruct(images)[visible], images[visible])
    assert spark.to("meta").random_mask(2).device.type == "meta"
    with pytest.raises(ValueError, match=r"mask is a tensor \(3, 4\), but the grid of patches is \(3, 3\)"):
        sf.SparK(**{**SMALLEST, "img_size": 96}, mask=chosen)
    with pytest.raises(ValueError, match=r"mask_ratio=0\.5, but the mask is a tensor that hides 0\.75"):
        spark.set_mask_ratio(0.5)


def test_a_mask_function():
    """Its counts are taken as they come, unless it promises them; what it returns is checked."""
    seen = []

    def left(batch, grid, mask_ratio, generator, device):
        seen.append((batch, grid, mask_ratio, device))
        active = torch.zeros(batch, *grid, dtype=torch.bool, device=device)
        active[:, :, : grid[1] // 2] = True
        active[0, 0, 0] = False
        return active

    spark, images = sf.SparK(**SMALLEST, mask=left, mask_ratio=0.5), torch.randn(2, 3, 96, 128)
    assert spark.len_keep is None
    assert torch.equal(spark(images), spark(images, left(2, (3, 4), 0.5, None, None)))
    assert seen[0] == (2, (3, 4), 0.5, images.device)
    left.exact = True
    broken = sf.SparK(**SMALLEST, mask=left, mask_ratio=0.5)
    with pytest.raises(RuntimeError, match="per_image=6"):  # one image shows 5
        broken(images)


@pytest.mark.parametrize(
    ("result", "word"),
    [
        (torch.ones(2, 3, 4), "mask must return a bool tensor .* torch.float32"),
        ([[True]], "mask must return a bool tensor .* list"),
        (torch.ones(2, 4, 3, dtype=torch.bool), r"mask must return .* \(2, 3, 4\); got \(2, 4, 3\)"),
        (torch.ones(3, 4, dtype=torch.bool), r"mask must return .* got \(3, 4\)"),
    ],
    ids=["float", "list", "transposed", "one"],
)
def test_a_wrong_mask_function_is_named(result, word):
    spark = sf.SparK(**SMALLEST, mask=lambda *arguments: result)
    with pytest.raises((TypeError, ValueError), match=word):
        spark(torch.randn(2, 3, 96, 128))


def test_a_map_of_stride_1_has_no_place_in_the_decoder():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 2, 2)

        def forward(self, x):
            return [self.a(x), self.b(self.a(x))]

    with pytest.raises(ValueError, match="stride 1 has no place"):
        sf.SparK(Net(), img_size=32, decoder_width=32, stages=2)
