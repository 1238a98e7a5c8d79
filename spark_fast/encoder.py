"""The encoder: any convnet, unmodified, on a SparseTensor; its feature maps, finest first."""

from __future__ import annotations

import difflib
import math
import threading
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from spark_fast.fusion import Fusion
from spark_fast.ops.backend import BackendError
from spark_fast.patches import ActivePatches
from spark_fast.rules import SparseOpError
from spark_fast.tensor import SparseMap, SparseTensor

PROBE_SIDE = 128  # pixels; larger than any total stride in use
# Where timm's feature_info names no submodules: a layer that gives all maps.
FEATURE_LAYERS = {"HighResolutionNet": ["stage4"]}


class _Done(Exception):  # noqa: N818  (a signal, not an error)
    """All wanted maps have been seen; what the model would do afterwards (head, pooling) is not needed."""


class _Maps:
    """The outputs of the wanted layers by name while an encoder runs, for each thread that runs it."""

    def __init__(self, wanted: int):
        self.wanted = wanted
        self.found: dict[int, dict[str, SparseTensor | torch.Tensor]] = {}

    @staticmethod
    def thread() -> int:
        """Of the caller. In a compiled graph, where `found` is gone, threads need not be told apart."""
        return 0 if torch.compiler.is_compiling() else threading.get_ident()


class _Tap:
    """A forward hook that writes its layer's output down. It stays on the layer, where it does nothing while no encoder
    runs: hooks that come and go with each call cannot be compiled."""

    def __init__(self, name: str, maps: _Maps):
        self.name, self.maps = name, maps

    def __call__(self, module, args, output) -> None:
        found = self.maps.found.get(self.maps.thread())
        if found is not None:
            found[self.name] = output
            if len(found) == self.maps.wanted:
                raise _Done


class Encoder(nn.Module):
    """A convnet and the layers whose outputs are its feature maps (paper, section 3.2).

    Args:
        model: a timm model name, or a module. A timm model's maps are those that its `feature_info` declares. Another
            module's maps are the outputs of `feature_layers`, or else what its forward returns (a list, tuple or dict).
        in_chans: image channels C.
        img_size: height and width of the images to come; a network that takes no other size is tried with it.
        stages: how many maps to use, counted from the coarsest; default: all those of stride 4 and more.
        feature_layers: names of submodules whose outputs are the maps, finest first.
        drop_path_rate: stochastic depth of a timm model made by name.
        model_kwargs: more arguments for timm.create_model.

    Attributes:
        model: the backbone; its state dict is the dense model's.
        strides, channels: of the maps used, finest first.
        total_stride: the coarsest stride.
        exact: every map's size is the images' divided by its stride; others are resized to it.
        fuse: whether operations that the model calls one after the other may run as one kernel (`spark_fast.fusion`).

    Raises:
        ValueError: unknown model or layer, no maps, maps not halving, `in_chans` that the model does not take.
    """

    def __init__(
        self,
        model: str | nn.Module,
        in_chans: int = 3,
        stages: int | None = None,
        feature_layers: list[str] | None = None,
        drop_path_rate: float = 0.0,
        model_kwargs: dict | None = None,
        img_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self.name = model if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            model = _create(model, in_chans, drop_path_rate, model_kwargs or {})
        elif not isinstance(model, nn.Module):
            raise TypeError(f"model must be a timm model name or a torch.nn.Module; got {type(model).__name__}")
        elif model_kwargs or drop_path_rate:
            raise ValueError("model_kwargs and drop_path_rate need a timm model name; set them on your module itself")
        self.model = model
        self.feature_layers = _feature_layers(model, feature_layers)
        self.maps = _Maps(len(self.feature_layers or ()))
        self.taps = [_Tap(name, self.maps) for name in self.feature_layers or ()]
        self.fuse = True
        self.used: list[int] | None = None  # indices of the maps used; None while probing: all
        self._probe(in_chans, stages, img_size)

    def _probe(self, in_chans: int, stages: int | None, img_size: tuple[int, int] | None) -> None:
        """Finds strides and channels of the maps by running one patch, and chooses the maps to use."""
        side = PROBE_SIDE
        try:
            maps = self._run(in_chans, side)
        except ValueError:
            if img_size is None or img_size[0] != img_size[1]:
                raise
            side = img_size[0]
            maps = self._run(in_chans, side)
        self.channels_last = [m.channels_last for m in maps]
        sizes = [m.shape[2] for m in maps]
        self.exact = all(side % size == 0 for size in sizes)
        strides = [side // size for size in sizes] if self.exact else self._nearest_strides(in_chans)
        self.used = _choose(self.name, strides, stages)
        self.strides = [strides[i] for i in self.used]
        self.channels = [maps[i].features.shape[1] for i in self.used]
        self.total_stride = self.strides[-1]

    def _run(self, in_chans: int, side: int) -> list[SparseTensor]:
        """The maps of one patch of zeros."""
        parameter = next(self.model.parameters(), torch.zeros(()))
        active = torch.ones(1, 1, 1, dtype=torch.bool, device=parameter.device)
        rows = parameter.new_zeros(side**2, in_chans)
        was_training = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                return self(SparseTensor(rows, ActivePatches(active, per_image=1), side))
        except (SparseOpError, BackendError, TypeError):
            raise
        except Exception as error:  # whatever a network that is no plain convnet runs into
            raise ValueError(
                f"model {self.name} does not run on masked images of in_chans={in_chans} channels, {side}x{side} "
                f"pixels: is it a convolutional network that takes them? ({type(error).__name__}: {error})"
            ) from error
        finally:
            for module, training in was_training:
                module.training = training

    def _nearest_strides(self, in_chans: int) -> list[int]:
        """Where the maps' sizes do not divide the image's: the strides that timm's feature_info declares, or else the
        powers of two that are nearest on a larger image."""
        declared = {info["module"]: info["reduction"] for info in _declared(self.model)}
        names = self.feature_layers or []
        if names and all(name in declared for name in names):
            return [declared[name] for name in names]
        large = 4 * PROBE_SIDE
        found = [large / m.shape[2] for m in self._run(in_chans, large)]
        strides = [1 << round(math.log2(stride)) for stride in found]
        if any(not 0.8 < stride / nominal < 1.25 for stride, nominal in zip(found, strides, strict=True)):
            exact = ", ".join(f"{stride:.3g}" for stride in found)
            warnings.warn(
                f"{self.name}: its maps have strides of about {exact}; they are resized to strides {strides}, the "
                "powers of two that the decoder needs",
                stacklevel=4,
            )
        return strides

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """The feature maps used, finest first, each of 1 / stride of the images' size.

        Args:
            x: (B, C, H, W) sparse images.

        Raises:
            TypeError: the model gave something other than SparseTensors.
        """
        maps = self.feature_maps(x)
        for value in maps:
            if not isinstance(value, SparseTensor):
                raise TypeError(
                    f"{self.name}: a feature map is {type(value).__name__}, not a SparseTensor. Give feature_layers, "
                    "the names of layers whose outputs are feature maps"
                )
        return maps

    def feature_maps(self, x: SparseTensor | torch.Tensor) -> list:
        """The feature maps used, finest first, of sparse or of dense images (then the network runs dense).

        Networks whose padding does not keep the size (Inception's) give maps that are a little smaller than the images'
        size by the stride: these are resized to it, each pixel taking the nearest one's features.
        """
        fuse = self.fuse and isinstance(x, SparseTensor) and not torch.compiler.is_compiling()
        maps = self._fused_maps(x) if fuse else self._all_maps(x)
        if self.used is None:
            return maps
        height, width = x.shape[2:]
        maps = [maps[i].permute(0, 3, 1, 2) if self.channels_last[i] else maps[i] for i in self.used]
        sizes = [(height // stride, width // stride) for stride in self.strides]
        if self.exact and any(tuple(value.shape[2:]) != size for value, size in zip(maps, sizes, strict=True)):
            found = ", ".join("x".join(map(str, value.shape[2:])) for value in maps)
            raise ValueError(
                f"{self.name}: its maps have {found} pixels for images of {height}x{width}, which strides "
                f"{self.strides} do not give: does it resize to a fixed size, or need another image size?"
            )
        return [_resized(value, x, size) for value, size in zip(maps, sizes, strict=True)]

    def _fused_maps(self, x: SparseTensor) -> list:
        """The maps of a run whose operations may wait for those after them; none does when it is over."""
        x = x.with_features(x.features)
        x.fusion = Fusion()
        try:
            maps = self._all_maps(x)
            x.fusion.settle()
        finally:
            x.fusion.open = False
        return maps

    def _all_maps(self, x: SparseTensor | torch.Tensor) -> list:
        return self._tapped(x) if self.feature_layers else _as_list(self.model(x))

    def _tapped(self, x: SparseTensor | torch.Tensor) -> list:
        for tap in self.taps:
            layer = self.model.get_submodule(tap.name)
            if not any(hook is tap for hook in layer._forward_hooks.values()):
                layer.register_forward_hook(tap)
        thread, found = self.maps.thread(), {}
        self.maps.found[thread] = found
        run = getattr(self.model, "forward_features", self.model)
        try:
            run(x)
        except _Done:
            pass
        finally:
            self.maps.found.pop(thread, None)
        missing = [name for name in self.feature_layers if name not in found]
        if missing:
            raise ValueError(f"feature_layers: {', '.join(missing)} did not run in {self.name}'s forward")
        return [value for name in self.feature_layers for value in _maps_in(found[name])]


def _create(name: str, in_chans: int, drop_path_rate: float, kwargs: dict) -> nn.Module:
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name.lower(), timm.list_models(), n=5)
        hint = f" Near it: {', '.join(close)}." if close else ""
        raise ValueError(f"model={name!r} is not a timm model.{hint} `timm.list_models()` lists them")
    settings = {"num_classes": 0, "in_chans": in_chans, **kwargs}
    if drop_path_rate:
        settings["drop_path_rate"] = drop_path_rate
    return timm.create_model(name, **settings)


def _declared(model: nn.Module) -> list[dict]:
    """timm's feature_info."""
    declared = getattr(model, "feature_info", None) or []
    return declared if isinstance(declared, list) else list(declared.info)


def _feature_layers(model: nn.Module, names: list[str] | None) -> list[str] | None:
    if isinstance(names, str):
        raise TypeError(f"feature_layers must be a list of names; got {names!r}. Write [{names!r}]")
    source = "feature_layers" if names is not None else "the layers that the model's feature_info declares"
    if names is None:
        names = FEATURE_LAYERS.get(type(model).__name__) or [
            info["module"] for info in _declared(model) if info["module"]
        ]
        if not names:
            return None
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"feature_layers must be names of submodules; got {list(names)!r}")
    known = dict(model.named_modules())
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"{source}: {', '.join(unknown) or 'the list is empty'}. Give feature_layers, names of submodules of "
            f"{type(model).__name__}, such as {', '.join(list(known)[1:6])}"
        )
    return list(names)


def _as_list(maps) -> list:
    if isinstance(maps, dict):
        maps = list(maps.values())
    if not isinstance(maps, list | tuple) or not maps:
        raise TypeError(
            f"the model must return its feature maps as a list, tuple or dict, finest first; got "
            f"{type(maps).__name__}. Or give feature_layers, the names of the layers whose outputs are the maps"
        )
    return list(maps)


def _maps_in(output) -> list:
    """A layer's output as maps: of several ones, the first of each size."""
    if not isinstance(output, list | tuple):
        return [output]
    by_size: dict = {}
    for value in output:
        by_size.setdefault(tuple(value.shape[2:]), value)
    return list(by_size.values())


def _resized(x, images: SparseTensor | torch.Tensor, size: tuple[int, int]):
    """A map in its nominal size, and on the images' patches."""
    if not isinstance(x, SparseMap | torch.Tensor) or tuple(x.shape[2:]) == size:
        return x
    if isinstance(x, torch.Tensor):
        return F.interpolate(x, size, mode="nearest-exact")
    return SparseTensor.from_dense(F.interpolate(x.to_dense(), size, mode="nearest-exact"), images.patches)


def _is_no_power(ratio: float) -> bool:
    return not ratio.is_integer() or int(ratio) & (int(ratio) - 1) != 0


def _choose(name: str, strides: list[int], stages: int | None) -> list[int]:
    """Indices of the maps to use: the last of each stride, from stride 4 on, then the `stages` coarsest."""
    if strides != sorted(strides) or any(_is_no_power(strides[-1] / s) for s in strides):
        raise ValueError(
            f"{name}: each map must have the size of the last times a power of two, finest first; got strides {strides}"
        )
    last = {stride: i for i, stride in enumerate(strides)}
    usable = [i for stride, i in last.items() if stride >= min(4, strides[-1])]
    if stages is None:
        return usable
    if not 1 <= stages <= len(last):
        raise ValueError(f"stages must be between 1 and {len(last)}, the maps of {name} (strides {list(last)})")
    return list(last.values())[-stages:]
