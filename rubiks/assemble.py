"""From a composed configuration to objects: the one place that knows both."""

from __future__ import annotations

import hashlib
import inspect
import logging
import re
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from rubiks import launched, processes, runs
from rubiks.data import builtin, sources
from rubiks.data.augment import Augment
from rubiks.data.datamodule import VideoDataModule, default_workers
from rubiks.data.dataset import Views
from rubiks.data.flip import mirrored_labels, tells
from rubiks.data.images import ImageFolders
from rubiks.data.manifest import Manifest
from rubiks.data.readers import check_reader
from rubiks.data.records import VideoRecord
from rubiks.data.shards import Shards
from rubiks.data.sources.annotations import nfc
from rubiks.data.views import TrainingViews
from rubiks.data.workers import LONGEST
from rubiks.errors import InputError
from rubiks.evaluation.protocols import FRAME_ORDERS, Protocol
from rubiks.files import check_writable
from rubiks.models import VARIANTS, RubiksNet, checkpoint, inflation
from rubiks.models.checkpoint import SavedNetwork
from rubiks.models.rubiksnet import STRIDE
from rubiks.training.aq import AttentionSchedule
from rubiks.training.mixing import Mixing
from rubiks.training.recipe import Recipe

log = logging.getLogger(__name__)

OFFICIAL_SIZE = 224  # of the views that the official files were trained on

# Keys of data that name files and folders.
_OPTIONAL_NAMES = ("train_list", "val_list", "labels")
_NAMES = ("root", "manifest", "videos", "lists", "release", "pattern", "train_folder", "val_folder", *_OPTIONAL_NAMES)


def one_of(key: str, value: Any, choices: tuple) -> Any:
    if value not in choices:
        raise InputError(f"{key} must be one of {', '.join(map(str, choices))}; got {value!r}")
    return value


def whole_number(key: str, value: Any, least: int, most: int = 2**32 - 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        limit = f" and at most {most:,}" if isinstance(value, int) and value > most else ""
        raise InputError(f"{key} must be a whole number of at least {least}{limit}, got {value!r}")
    return value


def share(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"{key} must be a number from 0 to 1, got {value!r}")
    return value


def plain(node: DictConfig) -> dict[str, Any]:
    """A section of the configuration as plain data, interpolations resolved."""
    content: Any = OmegaConf.to_container(node, resolve=True)
    assert isinstance(content, dict)
    return content


# ---- data


def source(cfg: DictConfig) -> sources.Source:
    """The data set's lists. The built-in data set is made here on first use."""
    data = cfg.data
    check_names(data)

    def lists() -> dict[str, Any]:
        return {key: data[key] for key in ("root", "train_list", "val_list", "labels")}

    try:
        match data.format:
            case "builtin":
                folder = builtin.generate(data.root, data.level, data.train_videos, data.val_videos, data.seed)
                return sources.SomethingSomethingV2(str(folder))
            case "ssv1" | "jester":
                places = {"release": data.release, "videos": data.videos}
                return sources.TwentyBNFrames(**lists(), **places, first_frame=data.first_frame)
            case "ssv2":
                return sources.SomethingSomethingV2(**lists(), videos=data.videos)
            case "kinetics":
                return sources.Kinetics(**lists())
            case "ucf101":
                return sources.UCF101(**lists(), split=official_split(cfg), videos=data.videos)
            case "hmdb51":
                return sources.HMDB51(data.root, official_split(cfg), data.lists, data.videos)
            case "frames":
                return sources.FrameLists(**lists(), pattern=data.pattern, first_frame=data.first_frame)
            case "csv":
                return sources.CsvLists(**lists())
            case "images":
                return ImageFolders(data.root, data.train_folder, data.val_folder)
            case "shards":
                return Shards(data.root)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is not set; data={data.format} needs it") from None
    raise InputError(f"data.format={data.format!r} is unknown; leave it as data= sets it")


def check_names(data: DictConfig) -> None:
    """Raise InputError where a key of data that names a file or folder holds something else."""
    for key in _NAMES:
        if key not in data or (data[key] is None and key in _OPTIONAL_NAMES):  # not in: also where it is ???
            continue
        if not isinstance(data[key], str):
            raise InputError(
                f"data.{key} must be the name of a file or folder, got {data[key]!r}; quote a name that looks like a "
                f"number: 'data.{key}=\"5\"'"
            )


def official_split(cfg: DictConfig) -> int:
    """Which of the three official splits of UCF101 or HMDB51."""
    return one_of("data.split", whole_number("data.split", cfg.data.split, 1), (1, 2, 3))


def check_class_count(cfg: DictConfig, data: sources.Source) -> None:
    """Raise InputError where the data set names its classes and they are not data.num_classes many."""
    names, count = data.classes, cfg.data.num_classes
    if count is not None:
        whole_number("data.num_classes", count, 1, most=1_000_000)
        if names is not None and len(names) != count:
            raise InputError(
                f"{data.classes_path}: expected data.num_classes={count} classes, got {len(names)}; use the official "
                f"files of data={cfg.data.format}, or for a part or another edition of it set "
                f"data.num_classes={len(names)}"
            )


def class_names(cfg: DictConfig, data: sources.Source, saved: SavedNetwork | None = None) -> list[str]:
    """Class names in label order: the data set's, or as many numbers as data.num_classes, or the checkpoint's."""
    check_class_count(cfg, data)
    names, count = data.classes, cfg.data.num_classes
    if names is None and count is None and saved is not None:
        names, count = saved.classes, saved.num_classes
    if names is None and count is None:
        raise InputError(
            f"data={cfg.data.format} does not name its classes: set data.num_classes=, or data.labels= to a text file "
            "with one class a line"
        )
    return names if names is not None else [str(label) for label in range(count)]


def manifest(cfg: DictConfig) -> Manifest:
    """What `rubiks check` or `rubiks prepare` wrote beside the videos; empty where neither has run."""
    try:
        found = Manifest(cfg.data.root, cfg.data.manifest)
    except MissingMandatoryValue as error:
        raise InputError(f"{error.full_key} is not set; data={cfg.data.format} needs it") from None
    if found.outdated:
        log.warning(
            "%s: %s entries are of another version, of no use until rubiks check has read those videos anew",
            found.path,
            found.outdated,
        )
    return found


def records(
    cfg: DictConfig, data: sources.Source, split: sources.Split, num_classes: int, checked: Manifest
) -> tuple[list[VideoRecord], list[str]]:
    """The present videos of a split, and the paths of the missing ones, by the policy on unreadable videos."""
    present, missing = data.records(split)
    sources.check_labels(present, num_classes, cfg.data.get(f"{split}_list") or f"the {split} list")
    total = len(present) + len(missing)
    if missing:
        message = f"{len(missing):,} of the {total:,} {split} videos are missing, the first is {missing[0]}"
        limit = share("data.max_bad", cfg.data.max_bad)
        # Videos vanish from YouTube; and who wrote the shards knew what was missing.
        usual = cfg.data.format in ("kinetics", "shards")
        if not usual and cfg.data.on_error == "raise":
            raise InputError(f"{message}. data.on_error=skip leaves them out and counts them")
        if not present or (not usual and len(missing) > limit * total):
            raise InputError(f"{message}; more than data.max_bad={limit:g} of the list. Check data.root")
        log.warning("%s", message)
    if checked.entries and not any(checked.name_of(record.path) in checked.entries for record in present):
        log.warning(
            "%s knows none of the %s videos: it is another data set's, or rubiks check has yet to read them",
            checked.path,
            split,
        )
    return checked.apply(present), missing


def datamodule(
    cfg: DictConfig,
    train: list[VideoRecord],
    val: list[VideoRecord],
    train_views: Views,
    val_views: Views,
    batch_size: int,
    eval_batch_size: int,
    balanced: bool = False,
) -> VideoDataModule:
    """The loader of the chosen data set."""
    devices = cfg.trainer.devices if isinstance(cfg.trainer.devices, int) else torch.cuda.device_count()
    devices = max(1, devices)
    workers = default_workers(devices) if cfg.data.workers == "auto" else cfg.data.workers
    if train:
        check_batch_statistics(cfg, len(train), batch_size, devices)
    return VideoDataModule(
        train,
        val,
        train_views,
        val_views,
        batch_size,
        eval_batch_size,
        whole_number("data.workers", workers, 0),
        cfg.seed,
        one_of("data.on_error", cfg.data.on_error, ("raise", "skip")),
        share("data.max_bad", cfg.data.max_bad),
        reader(cfg),
        timeout(cfg),
        balanced,
    )


def check_batch_statistics(cfg: DictConfig, videos: int, batch_size: int, devices: int) -> None:
    """Raise InputError where a training batch gives batch norm a single value per channel, which has no variance.

    So few are left in the last stage alone, of one clip of one frame in the batch of a process.
    """
    processes = devices * whole_number("trainer.num_nodes", cfg.trainer.num_nodes, 1)
    if processes > 1 and cfg.trainer.sync_batchnorm:
        return
    videos_per_batch = min(batch_size, videos // processes)
    if videos_per_batch * cfg.data.clips_per_video * cfg.data.num_frames == 1 and cfg.data.size <= STRIDE:
        short = f" (of {videos:,} videos, on {processes} processes)" if videos_per_batch < batch_size else ""
        raise InputError(
            f"data.size={cfg.data.size}, data.num_frames=1, data.clips_per_video=1 and recipe.batch_size={batch_size}"
            f"{short} leave batch norm a single value per channel in the last stage, too few to train; raise data.size "
            f"above {STRIDE}, or one of the others above 1"
        )


def training_views(cfg: DictConfig, classes: list[str], crop_scales: tuple[float, ...]) -> TrainingViews:
    """What becomes of a training video."""
    num_frames, augmentation = whole_number("data.num_frames", cfg.data.num_frames, 1), augment(cfg)
    window = dense_window(cfg.data.sampling, cfg.data.window, num_frames)
    if window is None and augmentation.temporal_jitter:
        raise InputError(
            "augment.temporal_jitter=true is for data.sampling=dense; uniform sampling takes a random frame of each "
            "segment anyway. Leave one of them out"
        )
    return TrainingViews(
        num_frames,
        whole_number("data.size", cfg.data.size, 16),
        crop_scales,
        flip(cfg, classes),
        whole_number("data.clips_per_video", cfg.data.clips_per_video, 1),
        window,
        augmentation,
    )


def augment(cfg: DictConfig) -> Augment:
    """What is done to training clips."""
    values = plain(cfg.augment)
    check_known("augment", values, Augment)
    if isinstance(values["random_resized_crop"], list):
        values["random_resized_crop"] = tuple(values["random_resized_crop"])
    return Augment(**values)


def mixing(cfg: DictConfig, num_classes: int) -> Mixing | None:
    """What mixes the clips of a training batch; None where nothing does."""
    chosen = augment(cfg)
    if not chosen.mixup and not chosen.cutmix:
        return None
    return Mixing(chosen.mixup, chosen.cutmix, num_classes, cfg.seed)


def flip(cfg: DictConfig, classes: list[str]) -> list[int] | None:
    """The class that a mirrored clip of each class shows; None where no clips are mirrored."""
    choice = one_of("data.flip", cfg.data.flip, (True, False, "auto"))
    if not choice:
        return None
    mirrored, alone = mirrored_labels(classes)
    silent = next((name for name in classes if not tells(name)), None)
    if choice == "auto" and (alone or silent):
        reason = f"class {alone[0]!r} has no mirror image" if alone else f"the class name {silent!r} tells no side"
        log.warning("data.flip=auto: clips are not mirrored, as %s; data.flip=true mirrors them all the same", reason)
        return None
    for label, other in enumerate(mirrored):
        if label < other:
            log.info("data.flip: mirroring exchanges the classes %r and %r", classes[label], classes[other])
    return mirrored


def dense_window(sampling: str, window: int, num_frames: int) -> int | None:
    """Frames that a densely sampled clip spans; None for uniform sampling."""
    if one_of("data.sampling", sampling, ("uniform", "dense")) == "uniform":
        return None
    if isinstance(window, bool) or not isinstance(window, int) or not num_frames <= window <= 1_000_000:
        raise InputError(
            f"data.window must be a whole number of at least data.num_frames={num_frames}, the frames of a clip within "
            f"it, and at most 1,000,000; got {window!r}"
        )
    return window


def reader(cfg: DictConfig) -> str:
    """What reads video files."""
    check_reader(cfg.data.reader)
    return cfg.data.reader


def timeout(cfg: DictConfig) -> float | None:
    """Seconds for a video, or None."""
    value = cfg.data.timeout
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (known and 0 < value <= LONGEST):
        raise InputError(
            f"data.timeout must be a number of seconds above 0 and at most {LONGEST:,}, or null for no limit; got "
            f"{value!r}"
        )
    return value


def protocol(cfg: DictConfig, num_frames: int, size: int, window: int | None, frame_order: str = "natural") -> Protocol:
    """The evaluation protocol, for clips of `num_frames`, sampled densely where there is a window, of `size` pixels."""
    clips = whole_number("protocol.clips", cfg.protocol.clips, 1)
    if window is None and clips > 2:
        raise InputError(
            f"protocol.clips must be 1 or 2 with data.sampling=uniform, got {clips}; choose another protocol, or "
            "data.sampling=dense, which has any number"
        )
    return Protocol(
        cfg.protocol.name,
        clips,
        one_of("protocol.crops", cfg.protocol.crops, (1, 3)),
        whole_number("data.num_frames", num_frames, 1),
        whole_number("data.size", size, 16),
        one_of("frame_order", frame_order, FRAME_ORDERS),
        window,
    )


# ---- network


def recipe(cfg: DictConfig) -> Recipe:
    values = plain(cfg.recipe)
    for key in ("milestones", "crop_scales"):
        if not isinstance(values[key], list):
            raise InputError(f"recipe.{key} must be a list, got {values[key]!r}")
        values[key] = tuple(values[key])
    check_known("recipe", values, Recipe)
    return Recipe(**values)


def attention_schedule(cfg: DictConfig) -> AttentionSchedule | None:
    """How the temporal attention is quantised; None for variants without."""
    if "aq" not in cfg:
        return None
    values = plain(cfg.aq)
    check_known("aq", values, AttentionSchedule)
    return AttentionSchedule(**values)


def check_known(section: str, values: dict[str, Any], settings: type) -> None:
    """Raise InputError for a key of a section that its settings do not have."""
    known = inspect.signature(settings).parameters
    for key in values:
        if key not in known:
            raise InputError(f"{section}.{key} is unknown; {section} has {', '.join(known)}")


def network(cfg: DictConfig, classes: list[str], dropout: float, use_init: bool = True) -> RubiksNet:
    """A new network, or one that starts from the weights of `init`."""
    frames = whole_number("data.num_frames", cfg.data.num_frames, 1)
    net = RubiksNet(cfg.tier.name, len(classes), cfg.variant.name, frames, dropout)
    if use_init and cfg.init is not None:
        saved = checkpoint.read(cfg.init)
        rule = one_of("init_temporal", cfg.init_temporal, inflation.RULES)
        net.replace_classifier(saved.num_classes)
        if saved.variant == inflation.FROM and net.variant in inflation.INTO and saved.tier == net.tier:
            inflation.inflate(net, RubiksNet.from_saved(saved), rule)
            variants = ", to ".join(f"{name} ({VARIANTS[name].about})" for name in (saved.variant, net.variant))
            log.info("init: inflated from %s, in time by init_temporal=%s", variants, rule)
        else:
            check_same_network(cfg, saved)
            checkpoint.load_weights(net, saved)
        # An official file does not name its classes: then their number decides.
        if saved.num_classes != len(classes) or (saved.classes is not None and not same_names(saved.classes, classes)):
            net.replace_classifier(len(classes))
            log.info("init: weights of %s, with a new classifier for %d classes", cfg.init, len(classes))
        else:
            log.info("init: weights of %s, with its classifier", cfg.init)
    return net


def check_same_network(cfg: DictConfig, saved: SavedNetwork) -> None:
    """Raise InputError unless the checkpoint of `init` is of the chosen tier and variant."""
    if (saved.tier, saved.variant) != (cfg.tier.name, cfg.variant.name):
        raise InputError(
            f"init={saved.path} holds tier={saved.tier} variant={saved.variant}, but tier={cfg.tier.name} "
            f"variant={cfg.variant.name} is chosen; add tier={saved.tier} variant={saved.variant}. From "
            f"{inflation.FROM}, the variants {', '.join(inflation.INTO)} of the same tier can start too"
        )


def check_same_classes(saved: SavedNetwork, classes: list[str]) -> None:
    """Raise InputError unless a checkpoint's classes are the data set's: their names where the file has them."""
    if saved.num_classes != len(classes):
        raise InputError(f"{saved.path} has {saved.num_classes} classes, but the data set has {len(classes)}")
    if saved.classes is not None and not same_names(saved.classes, classes):
        label = next(i for i, (a, b) in enumerate(zip(saved.classes, classes, strict=True)) if nfc(a) != nfc(b))
        raise InputError(
            f"{saved.path} was trained on other classes: class {label} is {saved.classes[label]!r} there and "
            f"{classes[label]!r} in the data set; set data.labels to the list it was trained with"
        )


def same_names(names: list[str], others: list[str]) -> bool:
    """Whether names are the same whichever way accented letters are written: as in NFC, or as macOS does."""
    return list(map(nfc, names)) == list(map(nfc, others))


def evaluated_checkpoint(cfg: DictConfig) -> SavedNetwork:
    """The checkpoint that `ckpt` names, which decides on tier and variant."""
    path = cfg.ckpt
    chosen = {key: cfg[key].name for key in ("tier", "variant") if key in cfg}
    if path == "latest":
        named = named_run(cfg)  # run=NAME may name a training run: then that one is meant
        found = named if named and named.checkpoint() else runs.newest(cfg.data.name, **chosen)
        if found is None:
            wanted = " ".join(f"{key}={name}" for key, name in {"data": cfg.data.name, **chosen}.items())
            raise InputError(
                f"ckpt=latest: no run of {wanted} with a checkpoint in {runs.OUTPUTS.resolve()}. "
                "Train one with train.py, or give ckpt=FILE"
            )
        path = found.checkpoint()
    elif path is not None and Path(path).is_dir():
        path = runs.Run(Path(path)).checkpoint()
        if path is None:
            raise InputError(f"ckpt={cfg.ckpt} is a folder without checkpoints/best.ckpt or checkpoints/last.ckpt")
    if path is None:
        raise InputError("ckpt is empty; give a checkpoint file, a run's folder, or latest")
    saved = checkpoint.read(path)
    wrong = [f"{key}={name}" for key, name in chosen.items() if name != getattr(saved, key)]
    if wrong:
        raise InputError(
            f"ckpt={saved.path} holds tier={saved.tier} variant={saved.variant}, but {' '.join(wrong)} is chosen; "
            "leave tier and variant out, they come from the checkpoint"
        )
    return saved


def predictions_file(cfg: DictConfig) -> Path | None:
    """Where an evaluation's scores go, if anywhere."""
    name = cfg.save_predictions
    if name is None:
        return None
    if not isinstance(name, str) or Path(name).suffix != ".npz":
        raise InputError(f"save_predictions must be the name of an .npz file, for example scores.npz; got {name!r}")
    check_writable(name)
    return Path(name)


# ---- runs and training


def run(cfg: DictConfig) -> runs.Run:
    """The run's folder: the one that `run` names, or by default a new one."""
    given = processes.given_run()
    if given is not None:
        return runs.Run(given)
    named = named_run(cfg)
    if named is not None:
        return named
    if cfg.trainer.fast_dev_run or not launched.is_first():  # nothing is written
        return runs.Run(runs.OUTPUTS / str(cfg.run))
    return runs.new(_run_name(cfg))


def is_sweep() -> bool:
    """Whether this is one of several runs of --multirun."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def named_run(cfg: DictConfig) -> runs.Run | None:
    """The run that run= names on the command line."""
    name = _run_name(cfg)
    return runs.Run(runs.OUTPUTS / name) if any(choice.startswith("run=") for choice in choices()) else None


def _run_name(cfg: DictConfig) -> str:
    if not re.fullmatch(r"[\w.,=+-]+", str(cfg.run)) or set(str(cfg.run)) <= {"."}:
        raise InputError(f"run must be a name of letters, digits and ._,=+- (it names a folder), got {cfg.run!r}")
    return f"{cfg.run}-{HydraConfig.get().job.num}" if is_sweep() else str(cfg.run)


def choices() -> list[str]:
    """The command line's choices."""
    return list(HydraConfig.get().overrides.task)


def unfinished(cfg: DictConfig, run: runs.Run, epochs: int) -> SavedNetwork | None:
    """The checkpoint that the run goes on from; None for a new run."""
    done = run.epochs_finished()
    if done is not None and done >= epochs:
        raise InputError(
            f"{run.folder} holds a finished run of {done} epochs; choose another run=, raise recipe.epochs to go on, "
            "or remove the folder"
        )
    return run.read_last()


def digest(videos: list[VideoRecord]) -> str:
    """SHA-256 of the names and labels of a list, in order."""
    total = hashlib.sha256()
    for video in videos:
        total.update(f"{video.name}\t{video.label}\n".encode(errors="surrogateescape"))
    return total.hexdigest()


def choices_for_evaluation() -> list[str]:
    """Those of the command line's choices that an evaluation of the run needs too."""
    shared = ("data", "device", "precision")  # tier and variant come from the checkpoint
    training = ("data.clips_per_video", "data.balanced")  # keys that eval.py does not have
    keys = [(choice, choice.split("=")[0].lstrip("+")) for choice in choices()]
    return [choice for choice, key in keys if key.split(".")[0] in shared and key not in training]


def on_gpu(cfg: DictConfig) -> bool:
    device = one_of("device", cfg.device, ("auto", "cpu", "gpu"))
    if device == "gpu" and not torch.cuda.is_available():
        raise InputError("device=gpu, but PyTorch finds no GPU; use device=cpu or install PyTorch for CUDA")
    return device != "cpu" and torch.cuda.is_available()
