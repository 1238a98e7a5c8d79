"""The encoder: any convnet, unmodified, on a SparseTensor; its feature maps, finest first."""

from __future__ import annotations

import difflib
import threading

import torch
from torch import nn

from spark_fast.ops.backend import BackendError
from spark_fast.patches import ActivePatches
from spark_fast.rules import SparseOpError
from spark_fast.tensor import SparseTensor

PROBE_SIDE = 128  # pixels; larger than any total stride in use


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
        stages: how many maps to use, counted from the coarsest; default: all those of stride 4 and more.
        feature_layers: names of submodules whose outputs are the maps, finest first.
        drop_path_rate: stochastic depth of a timm model made by name.
        model_kwargs: more arguments for timm.create_model.

    Attributes:
        model: the backbone; its state dict is the dense model's.
        strides, channels: of the maps used, finest first.
        total_stride: the coarsest stride.

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
        self.used: list[int] | None = None  # indices of the maps used; None while probing: all
        self._probe(in_chans, stages)

    def _probe(self, in_chans: int, stages: int | None) -> None:
        """Finds strides and channels of the maps by running one patch, and chooses the maps to use."""
        parameter = next(self.model.parameters(), torch.zeros(()))
        active = torch.ones(1, 1, 1, dtype=torch.bool, device=parameter.device)
        rows = parameter.new_zeros(PROBE_SIDE**2, in_chans)
        was_training = [(m, m.training) for m in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                maps = self(SparseTensor(rows, ActivePatches(active, per_image=1), PROBE_SIDE))
        except (SparseOpError, BackendError, TypeError):
            raise
        except Exception as error:  # whatever a network that is no plain convnet runs into
            raise ValueError(
                f"model {self.name} does not run on masked images of in_chans={in_chans} channels, {PROBE_SIDE}x"
                f"{PROBE_SIDE} pixels: is it a convolutional network that takes them? ({type(error).__name__}: {error})"
            ) from error
        finally:
            for module, training in was_training:
                module.training = training
        strides = [PROBE_SIDE // m.side for m in maps]
        self.used = _choose(self.name, strides, stages)
        self.strides = [strides[i] for i in self.used]
        self.channels = [maps[i].features.shape[1] for i in self.used]
        self.total_stride = self.strides[-1]

    def forward(self, x: SparseTensor) -> list[SparseTensor]:
        """The feature maps used, finest first.

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
        """The feature maps used, finest first, of sparse or of dense images (then the network runs dense)."""
        maps = self._tapped(x) if self.feature_layers else _as_list(self.model(x))
        return maps if self.used is None else [maps[i] for i in self.used]

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
        return [found[name] for name in self.feature_layers]


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


def _feature_layers(model: nn.Module, names: list[str] | None) -> list[str] | None:
    if isinstance(names, str):
        raise TypeError(f"feature_layers must be a list of names; got {names!r}. Write [{names!r}]")
    source = "feature_layers" if names is not None else "the layers that the model's feature_info declares"
    if names is None:
        declared = getattr(model, "feature_info", None)
        if not declared:
            return None
        infos = declared if isinstance(declared, list) else list(declared.info)
        names = [info["module"] for info in infos]
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


def _choose(name: str, strides: list[int], stages: int | None) -> list[int]:
    """Indices of the maps to use: the last of each stride, from stride 4 on, then the `stages` coarsest."""
    if strides != sorted(strides) or any(s & (s - 1) for s in strides):
        raise ValueError(f"{name}: the maps' strides must be powers of two, finest first; got {strides}")
    last = {stride: i for i, stride in enumerate(strides)}
    usable = [i for stride, i in last.items() if stride >= min(4, strides[-1])]
    if stages is None:
        return usable
    if not 1 <= stages <= len(last):
        raise ValueError(f"stages must be between 1 and {len(last)}, the maps of {name} (strides {list(last)})")
    return list(last.values())[-stages:]
