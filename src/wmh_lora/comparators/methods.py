"""Each method from training to probability maps, behind one function: `fit`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from wmh_lora.comparators.brightness import brightness_map, choose_k, scale_of
from wmh_lora.comparators.budget import ComparatorNet, Spent, train_within
from wmh_lora.comparators.losses import RegionLoss
from wmh_lora.comparators.scans import Fold, PatchStream, TrainingScans, channels_of
from wmh_lora.comparators.settings import (
    ComparisonConfig,
    DynUNetSettings,
    MethodSettings,
    ThresholdSettings,
    UNet2dSettings,
    UnetrSettings,
    WMHLoraSettings,
    method_settings,
    training_settings,
)
from wmh_lora.comparators.unet2d import UNet2d
from wmh_lora.comparators.volumetric import build_dynunet, build_unetr, plan_network, slide
from wmh_lora.config import InferenceConfig, ModelConfig, TtaMode
from wmh_lora.config_reading import to_dict
from wmh_lora.data.slices import SliceStream
from wmh_lora.engine import WMHInferenceEngine
from wmh_lora.errors import ConfigError
from wmh_lora.files import file_sha256
from wmh_lora.models.encoders import encoder_spec
from wmh_lora.models.model_file import ModelCard, save_model
from wmh_lora.models.network import build_network
from wmh_lora.models.registry import Model, load_model
from wmh_lora.models.weights import resolve_base_weights
from wmh_lora.preprocess import preprocess, restore
from wmh_lora.training.losses import SegmentationLoss
from wmh_lora.training.settings import TrainingConfig
from wmh_lora.volume import Volume

__all__ = ["Fitted", "Task", "fit"]

FloatArray = npt.NDArray[np.float32]

_SURE = 1e-7  # probabilities this near to 0 or 1 are cut before they become logits again


@dataclass(frozen=True)
class Task:
    """One method in one fold.

    Attributes
    ----------
    config
        The whole comparison.
    name
        Of the method.
    fold
        Scans of each part.
    folder
        Of this method in this fold: checkpoints, the trained model.
    cache
        Of preprocessed slices, common to all.
    on_progress
        Called with the share of the training budget that is used up.
    """

    config: ComparisonConfig
    name: str
    fold: Fold
    folder: Path
    cache: Path
    on_progress: Callable[[float], None] | None = None


@dataclass(frozen=True)
class Fitted:
    """A method that is ready for scans.

    Attributes
    ----------
    predict
        From a FLAIR and its T1 (None where there is none) to the lesion probability (I, J, K).
    uses_t1
        Whether the T1 is looked at.
    parameters
        Trained ones, of all members.
    members
        Networks that are averaged.
    spent
        What the training of each member took.
    note
        What else a reader should know.
    """

    predict: Callable[[Volume, Volume | None], FloatArray]
    uses_t1: bool = False
    parameters: int = 0
    members: int = 1
    spent: tuple[Spent, ...] = field(default=())
    note: str = ""


def fit(task: Task) -> Fitted:
    """Train a method on its fold, within the budget.

    Raises
    ------
    ConfigError
        If a setting does not suit the method, or a library that it needs is absent.
    DataError
        If scans cannot be used for training.
    WeightsError
        If a foundation encoder's weights are absent.
    """
    settings = method_settings(task.config, task.name)
    if isinstance(settings, WMHLoraSettings):
        return _fit_wmh_lora(task, settings)
    if isinstance(settings, UNet2dSettings):
        return _fit_unet_2d(task, settings)
    if isinstance(settings, ThresholdSettings):
        return _fit_threshold(task, settings)
    return _fit_volumetric(task, settings)


def _fit_wmh_lora(task: Task, settings: WMHLoraSettings) -> Fitted:
    config = training_settings(task.config, settings)
    config = replace(config, seed=task.config.comparison.seed)
    if settings.model.t1_channels:
        raise ConfigError(
            f"methods.{task.name}.model.t1_channels = {settings.model.t1_channels}, but a "
            "comparison shows FLAIR alone to this network; set it to 0."
        )
    encoder = settings.model.encoder
    base: Path | None = None
    if encoder_spec(encoder).load is not None:
        base = resolve_base_weights(encoder, config.base_weights or None)
    net = build_network(settings.model, base, for_training=True, seed=config.seed)
    _check_sizes(task, net.size_multiple, config.crop)
    spent = train_within(
        net,
        SegmentationLoss(settings.model.structures, settings.loss),
        _slices(task, config, settings.model),
        config,
        task.config.comparison,
        task.folder / "member-1",
        on_progress=task.on_progress,
    )
    parameters = _trained(net)
    # as it would be used: adapters merged, norms folded
    path = task.folder / "model.safetensors"
    card = _card(task, settings.model, "" if base is None else file_sha256(base), config)
    save_model(path, net.cpu(), card)
    model = load_model(path, base_weights=base)
    return Fitted(_engine(task, model, config), parameters=parameters, spent=(spent,))


def _fit_unet_2d(task: Task, settings: UNet2dSettings) -> Fitted:
    config = training_settings(task.config, settings)
    own = ModelConfig(structures=("wmh",))  # what the engine asks of a model, but for its encoder

    def build() -> nn.Module:
        return ComparatorNet(
            UNet2d(settings.channels, settings.first_kernel, batch_norm=settings.batch_norm)
        )

    _check_sizes(task, 2 ** (len(settings.channels) - 1), config.crop)
    networks, spent = _train_members(
        task,
        settings,
        build,
        lambda seeded: _slices(task, seeded, own),
        RegionLoss(cross_entropy=False),
    )
    ensemble = _MeanProbability(networks)
    model = Model(
        net=ensemble,
        card=_card(task, own, "", config),
        path=task.folder,
        sha256="",
    )
    return Fitted(
        _engine(task, model, config),
        parameters=_trained(ensemble),
        members=len(networks),
        spent=spent,
    )


def _fit_volumetric(task: Task, settings: DynUNetSettings | UnetrSettings) -> Fitted:
    preprocessing, budget = task.config.preprocess, task.config.comparison
    scans = TrainingScans.read(task.fold, preprocessing, task.cache, t1=settings.t1)

    def stream(config: TrainingConfig) -> PatchStream:
        return PatchStream(scans, settings.patch_px, config.seed, task.fold.data.lesion_share)

    def build() -> nn.Module:
        if isinstance(settings, UnetrSettings):
            return build_unetr(settings)
        plan = plan_network(scans.spacing_mm, settings.patch_px, len(settings.filters))
        return build_dynunet(settings, plan)

    networks, spent = _train_members(
        task,
        settings,
        lambda: ComparatorNet(build(), channels=2 if settings.t1 else 1),
        stream,
        RegionLoss(cross_entropy=True),
    )

    def predict(volume: Volume, t1: Volume | None) -> FloatArray:
        prepared = preprocess(volume, preprocessing)
        channels = channels_of(volume, prepared, t1, with_t1=settings.t1)
        probability = slide(
            networks,
            channels,
            settings.patch_px,
            overlap=settings.overlap,
            mirror=budget.mirror,
        )
        return restore(probability, prepared)

    return Fitted(
        predict,
        uses_t1=settings.t1,
        parameters=sum(_trained(network) for network in networks),
        members=len(networks),
        spent=spent,
    )


def _fit_threshold(task: Task, settings: ThresholdSettings) -> Fitted:
    fold, preprocessing = task.fold, task.config.preprocess

    def scans() -> Iterator[tuple[str, Volume, npt.NDArray[np.float32]]]:
        for scan in fold.train.scans:
            labels = Volume.read(fold.file(scan.mask), allow_constant=True).data
            yield scan.subject, Volume.read(fold.file(scan.image)), np.rint(labels)

    k = choose_k(scans(), preprocessing, settings.k)
    scale = scale_of(settings.k)

    def predict(volume: Volume, _t1: Volume | None) -> FloatArray:
        brighter = brightness_map(preprocess(volume, preprocessing), scale)
        return (brighter >= np.float32(k / scale)).astype(np.float32)

    return Fitted(predict, note=f"k = {k:g}")


# --- what trained methods share -----------------------------------------------------------------


def _train_members(
    task: Task,
    settings: MethodSettings,
    build: Callable[[], nn.Module],
    stream: Callable[[TrainingConfig], SliceStream | PatchStream],
    loss: RegionLoss,
) -> tuple[list[nn.Module], tuple[Spent, ...]]:
    """Train the members of an ensemble, each with its share of the budget and its own seed."""
    count = getattr(settings, "members", 1)
    config = training_settings(task.config, settings)
    networks: list[nn.Module] = []
    spent = []

    def show(share: float) -> None:
        if task.on_progress is not None:
            task.on_progress((len(networks) + share) / count)

    for member in range(count):
        seeded = replace(config, seed=task.config.comparison.seed + member)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeded.seed)
            net = build()
        spent.append(
            train_within(
                net,
                loss,
                stream(seeded),
                seeded,
                task.config.comparison,
                task.folder / f"member-{member + 1}",
                members=count,
                on_progress=show,
            )
        )
        networks.append(net)
    return networks, tuple(spent)


class _MeanProbability(nn.Module):
    """Average the probabilities of several networks, as logits."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, slices: Tensor) -> Tensor:
        """Return logits (B, n, H, W) of the mean probability."""
        mean = torch.stack([torch.sigmoid(network(slices)) for network in self.networks]).mean(0)
        return torch.logit(mean, eps=_SURE)


def _slices(task: Task, config: TrainingConfig, model: ModelConfig) -> SliceStream:
    stream = SliceStream(
        task.fold.data,
        config.seed,
        config.crop,
        task.config.preprocess,
        model.structures,
        config.samples_per_step,
        task.cache,
        in_channels=model.in_channels,
    )
    stream.prepare()
    return stream


def _engine(
    task: Task, model: Model, config: TrainingConfig
) -> Callable[[Volume, Volume | None], FloatArray]:
    """Make maps by the engine that ``wmh-lora segment`` uses."""
    engine = WMHInferenceEngine(model, config.device)
    views: TtaMode = "flip" if task.config.comparison.mirror else "none"

    def predict(volume: Volume, _t1: Volume | None) -> FloatArray:
        return engine.predict(volume, tta=views)

    return predict


def _card(task: Task, model: ModelConfig, base_sha256: str, config: TrainingConfig) -> ModelCard:
    return ModelCard(
        name=task.name,
        model=model,
        preprocess=task.config.preprocess,
        inference=InferenceConfig(),
        base_sha256=base_sha256,
        training={"fold": task.fold.name, "training": to_dict(config)},
    )


def _trained(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)


def _check_sizes(task: Task, multiple: int, crop: int) -> None:
    """Raise ConfigError unless slices and crops can go through a network as they are prepared."""
    sizes = {"preprocess.multiple_px": task.config.preprocess.multiple_px, "training.crop": crop}
    for name, size in sizes.items():
        if size % multiple:
            raise ConfigError(
                f"{name} = {size} does not suit {task.name}, whose slices have sides that are "
                f"multiples of {multiple} pixels."
            )
