"""Every option of a run, checked: a frozen model whose fields are the options of a door. How a run is reopened."""

from __future__ import annotations

from argparse import SUPPRESS, ArgumentParser, BooleanOptionalAction
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from data.files import LARGEST_YAML, compose_yaml, read_bytes
from data.structures import Fault, nearest
from engine.runs import atomically
from models.checkpoint import Checkpoint, load_checkpoint
from models.parse import dump, parse

MOVABLE = {"resume", "data", "device", "workers"}  # options that a resumed run may change: they say where, not what
MOVABLE_IN_TRAINING = {"epochs", "patience", "save_period", "cache", "teacher", "noplots"}  # and these, by train.py
DESCRIBED = {"train.py": "model.yaml", "search.py": "search.yaml"}  # the model in a run's folder, by who began it
SPELLINGS = {"imgsz": ("--img", "--img-size"), "batch_size": ("--batch",)}  # that yolov5 knows too
ALONE = {"cache": "ram"}  # what an option means that is given without a value
CACHES: dict[bool | str, str] = {True: "ram", "true": "ram", False: "off", "false": "off"}  # as first versions had it

# What yolov5's hyper-parameter files hold and this program lacks: what it would be, and the value that means "none".
# None: it has no effect there either.
LACKING: dict[str, tuple[str, float | None]] = {
    "shear": ("shearing", 0.0),
    "perspective": ("perspective", 0.0),
    "copy_paste": ("pasting of segments; copy_small pastes small boxes", 0.0),
    "fl_gamma": ("focal loss", 0.0),
    "cls_pw": ("weight of positive classes", 1.0),
    "obj_pw": ("weight of positive objectness", 1.0),
    "iou_t": ("IoU threshold of training", None),
}


Row = Annotated[str, Field(coerce_numbers_to_str=True)]  # of a model: its number or its name


def _known_cache(value: Any) -> Any:
    if isinstance(value, str):
        return CACHES.get(value.lower(), value)
    return CACHES[value] if isinstance(value, bool) else value


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | int) else value


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("a batch has 1 image or more; -1 finds how many fit")
    return value


class RunConfig(BaseModel):
    """The options that every kind of run has. Names and meanings are yolov5's where it has the option."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    cfg: Path | None = Field(default=None, description="model YAML")
    dialect: str | None = Field(default=None, description="how to read --cfg; recognised where the file leaves it open")
    cfg_scale: str | None = Field(
        default=None, description="which of the sizes that --cfg lists under `scales:`; also --scale with a name"
    )
    trust_ops: bool = Field(default=False, description="run the Python file that --cfg names with `ops:`")
    data: Path | None = Field(default=None, description="data set YAML")
    weights: Path | None = Field(
        default=None, description="checkpoint to start from; what fits by name and shape is taken"
    )
    epochs: int = Field(default=100, ge=1, description="times that every training image is seen")
    batch_size: int = Field(default=16, ge=1, description="images a step")
    imgsz: int = Field(default=640, ge=32, description="side of the square that images are letterboxed into, pixels")
    device: str = Field(default="", description="cpu, 0, cuda:0 or mps; empty takes the first GPU, or the CPU")
    name: str = Field(default="exp", min_length=1, description="folder of this run; exp2, exp3, ... where it exists")
    exist_ok: bool = Field(default=False, description="take the folder even where it exists")
    seed: int = Field(default=0, ge=0, description="everything that is drawn by chance comes from it")
    workers: int = Field(default=0, ge=0, description="processes that prepare images; 0 prepares them in this one")
    cache: Annotated[Literal["ram", "disk", "off"], BeforeValidator(_known_cache)] = Field(
        default="ram", description="where decoded images are kept: ram takes 1 GiB a split at most"
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        default="auto", description="numbers of the forward pass; auto measures on a CPU whether bf16 pays"
    )

    noautoanchor: bool = Field(
        default=False, description="keep the anchors of --cfg even where they reach less than 98 % of the boxes"
    )

    optimizer: Literal["auto", "SGD", "Adam", "AdamW"] = Field(
        default="auto", description="auto: AdamW under 2,000 steps, else SGD"
    )
    lr0: float | None = Field(
        default=None,
        gt=0,
        description="largest learning rate; default 0.01 for SGD, 0.002 for Adam and AdamW, 0.005 in a search",
    )
    lrf: float = Field(default=0.01, ge=0, le=1, description="the last learning rate is lr0 * lrf")
    cos_lr: bool = Field(default=True, description="the learning rate falls along a cosine, else along a line")
    momentum: float = Field(default=0.937, ge=0, lt=1, description="of SGD; beta1 of Adam and AdamW")
    weight_decay: float = Field(default=5e-4, ge=0, description="of convolution and linear weights")
    warmup_epochs: float = Field(
        default=3.0, ge=0, description="epochs of rising learning rate; a tenth of the run at most"
    )
    warmup_momentum: float | None = Field(
        default=None, ge=0, lt=1, description="momentum of the first step, which rises meanwhile; default momentum"
    )
    warmup_bias_lr: float | None = Field(
        default=None, ge=0, description="learning rate of biases in the first step; default as of all weights"
    )

    box: float | None = Field(default=None, ge=0, description="gain of the box loss; default that of the head")
    obj: float | None = Field(default=None, ge=0, description="gain of the objectness loss, likewise")
    cls: float | None = Field(default=None, ge=0, description="gain of the class loss, likewise")
    dfl: float | None = Field(default=None, ge=0, description="gain of the distribution focal loss, likewise")
    anchor_t: float | None = Field(
        default=None, gt=1, description="largest ratio of a box to its anchor; default that of the head"
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="s: a class should score 1 - s/2, others s/2")
    class_weights: Literal["none", "median"] = Field(
        default="none", description="of a segmenter: median makes pixels of rare classes count more"
    )
    teacher: Path | None = Field(default=None, description="checkpoint to learn from as well, of the same classes")
    distill: float | None = Field(default=None, ge=0, description="gain of the loss against --teacher; default 1")

    mosaic: float = Field(default=1.0, ge=0, le=1, description="probability of joining four images")
    close_mosaic: int | None = Field(
        default=None, ge=0, description="last epochs without mosaic; default a tenth, 1 to 10"
    )
    mixup: float = Field(default=0.0, ge=0, le=1, description="probability of blending two images")
    copy_small: float = Field(
        default=0.0, ge=0, le=1, description="probability of pasting an image's small objects at free places again"
    )
    multi_scale: bool = Field(default=False, description="every batch at a size of its own, imgsz -50 to +50 %")
    scale: float = Field(default=0.5, ge=0, le=0.9, description="images are scaled by 1 - scale to 1 + scale")
    translate: float = Field(default=0.1, ge=0, le=0.9, description="and moved by up to this fraction of imgsz")
    degrees: float = Field(default=0.0, ge=0, le=180, description="and turned by up to this angle")
    hsv_h: float = Field(default=0.015, ge=0, le=1, description="largest relative change of hue")
    hsv_s: float = Field(default=0.7, ge=0, le=1, description="of saturation")
    hsv_v: float = Field(default=0.4, ge=0, le=1, description="of value")
    fliplr: float = Field(default=0.5, ge=0, le=1, description="probability of a left-right flip")
    flipud: float = Field(default=0.0, ge=0, le=1, description="probability of an upside-down flip")

    @model_validator(mode="before")
    @classmethod
    def _scale_by_name(cls, values: Any) -> Any:
        """``--scale s`` is a size of the model, ``--scale 0.5`` an augmentation: yolov5 and v8 both say scale."""
        word = values.get("scale") if isinstance(values, dict) else None
        if not isinstance(word, str) or not word[:1].isalpha() or word in ("nan", "inf"):
            return values
        return {"cfg_scale": word, **{name: value for name, value in values.items() if name != "scale"}}


class TrainConfig(RunConfig):
    """What `engine.train.train` needs to know: the options of ``train.py``.

    Built from user input by `train_config`, which turns what is wrong into a `Fault`.
    """

    resume: Path | None = Field(default=None, description="run folder, or its last.pt, to go on with")
    project: Path = Field(default=Path("runs/train"), description="folder of the runs")
    batch_size: Annotated[int, AfterValidator(_not_zero)] = Field(
        default=16, ge=-1, description="images a step; -1 finds how many fit"
    )
    single_cls: bool = Field(default=False, description="train as if all classes were one")
    rect: bool = Field(
        default=False, description="batches of images alike in shape, in the smallest rectangle; without mosaic"
    )
    freeze: Annotated[tuple[Row, ...], BeforeValidator(_several)] = Field(
        default=(), description="rows whose weights stay: one number N for the first N, or several numbers or names"
    )
    sync_bn: bool = Field(default=False, description="batch norms see the batches of all GPUs; needs several")
    patience: int | None = Field(
        default=None,
        ge=0,
        description="epochs without a better 0.9 AP + 0.1 AP50 (top-1, mIoU) before a run stops; default 100, 0 never",
    )
    save_period: int = Field(default=0, ge=0, description="epochs between checkpoints that are kept; 0 keeps none")
    noplots: bool = Field(default=False, description="draw no pictures into the run's folder")
    tune: int = Field(default=0, ge=0, description="trials of a search for hyper-parameters, instead of one training")
    noval: bool = Field(default=False, description="evaluate after the last epoch only")
    val_interval: int = Field(
        default=1, ge=1, description="epochs between evaluations; a short run makes about 10 at most"
    )


Config = TypeVar("Config", bound=BaseModel)


def train_config(values: Mapping[str, Any], where: str = "") -> TrainConfig:
    """The options of a training run from ``values`` by name; see `checked`."""
    return checked(TrainConfig, values, where)


def checked(model: type[Config], values: Mapping[str, Any], where: str = "") -> Config:
    """Check ``values`` by name. Raises a Fault with a line for each that is unknown or wrong.

    ``where`` begins these lines; ``--`` says that they are command line options.
    """
    try:
        return model(**values)
    except ValidationError as problem:
        raise Fault(*(_line(model, error, where) for error in problem.errors())) from None


def _line(model: type[BaseModel], error: Mapping[str, Any], where: str) -> str:
    name = str(error["loc"][0])
    shown = option_name(name) if where == "--" else f"{where}: {name}" if where else name
    if error["type"] == "extra_forbidden":
        return f"{shown}: there is no such option{nearest(name, model.model_fields)}"
    told = error["msg"].removeprefix("Value error, ")
    return f"{shown}: {told[0].lower()}{told[1:]}, got {error['input']!r}"


def option_name(field: str) -> str:
    """``batch_size`` -> ``--batch-size``."""
    return "--" + field.replace("_", "-")


def add_options(parser: ArgumentParser, model: type[BaseModel] = TrainConfig) -> None:
    """Add an option a field of a config. Values stay text, for `checked` to check; absent if not given.

    A field that is a tuple takes several values, and may be given several times.
    """
    for name, field in model.model_fields.items():
        names = (option_name(name), *SPELLINGS.get(name, ()))
        text = (field.description or "").replace("%", "%%")
        if field.annotation is bool:
            action = BooleanOptionalAction if field.default else "store_true"  # --no-cos-lr turns off what is on
            parser.add_argument(*names, dest=name, action=action, default=SUPPRESS, help=text)
        else:
            default = "" if field.default in (None, "", ()) else f" ({field.default})"
            several = get_origin(field.annotation) is tuple
            number = {"nargs": "+"} if several else {"nargs": "?", "const": ALONE[name]} if name in ALONE else {}
            parser.add_argument(
                *names,
                dest=name,
                action="extend" if several else "store",
                default=SUPPRESS,
                metavar=_metavar(field.annotation),
                help=text + default,
                **number,  # type: ignore[arg-type]
            )


def _metavar(annotation: Any) -> str:
    kinds = [kind for kind in get_args(annotation) if kind not in (type(None), ...)] or [annotation]
    return "|".join(
        kind if isinstance(kind, str) else {Path: "PATH", int: "N", str: "NAME", Row: "ROW"}.get(kind, "X")
        for kind in kinds
    )


def read_options(path: str | Path, model: type[BaseModel] = TrainConfig) -> dict[str, Any]:
    """The options in a YAML file (``lr0: 0.02``), yet to be checked. Raises a Fault with file and line.

    Only an option that takes several values, a tuple in `model`, may be a list here. A hyper-parameter file of yolov5
    is read too: what is `LACKING` here may stand in it with the value that means none.
    """
    path = Path(path)
    try:
        root = compose_yaml(read_bytes(path, LARGEST_YAML).decode("utf-8"))
    except yaml.YAMLError as problem:
        raise Fault(f"{path}: not YAML: {' '.join(str(problem).split())}") from None
    except UnicodeDecodeError:
        raise Fault(f"{path}: not a text file; a YAML file such as 'lr0: 0.02' would be right") from None
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise Fault(f"{path}:1: options are lines such as 'lr0: 0.02'")
    values: dict[str, Any] = {}
    lacking = []
    for key, value in root.value:
        where = f"{path}:{key.start_mark.line + 1}"
        name = str(key.value)
        if name in LACKING:
            lacking += _not_neutral(value, where, name)
            continue
        if name not in model.model_fields:
            raise Fault(f"{where}: there is no option {name!r}{nearest(name, model.model_fields)}")
        if name in values:
            raise Fault(f"{where}: {name} is given twice")
        if get_origin(model.model_fields[name].annotation) is tuple:
            items = value.value if isinstance(value, yaml.SequenceNode) else [value]
            values[name] = tuple(_scalar(item, where, name) for item in items)
        else:
            values[name] = _scalar(value, where, name)
    if lacking:
        raise Fault(*lacking)
    return values


def _not_neutral(node: yaml.Node, where: str, name: str) -> list[str]:
    """A line where an option of yolov5 asks for what this program lacks."""
    meaning, neutral = LACKING[name]
    given = _scalar(node, where, name)
    try:
        asked = neutral is not None and float(given or 0) != neutral
    except ValueError:
        asked = True
    return [f"{where}: {name} {given}: there is no {meaning} here; {neutral:g} would be right"] if asked else []


def _scalar(node: yaml.Node, where: str, name: str) -> str | None:
    if not isinstance(node, yaml.ScalarNode):
        raise Fault(f"{where}: {name} is one value, not a list or mapping")
    return None if node.tag.endswith(":null") else node.value


def save_config(path: str | Path, config: BaseModel) -> None:
    """Write every option as YAML that `read_options` reads back."""
    with atomically(path) as temporary:
        temporary.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude={"resume"}), sort_keys=False))


@contextmanager
def restoring(last: Path) -> Iterator[None]:
    """What a checkpoint's training state lacks, or has in another form than this run needs, becomes a Fault."""
    try:
        yield
    except Fault:
        raise
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as problem:
        told = " ".join(str(problem).split())[:120]
        what = f"nothing can go on from its training state ({told})"
        raise Fault(f"{last}: {what}; start anew with --weights {last}") from None


def reopen(
    config: Config, resume: Path, script: str, movable: Set[str] = frozenset(MOVABLE)
) -> tuple[Config, Path, Checkpoint]:
    """The config, folder and last checkpoint of the run at `resume`: its folder or a file in it. A Fault if it cannot
    go on.

    Only what is `movable` may be set in `config`: the rest is as the run began. `script` is the door that may go on
    with it, ``train.py`` or ``search.py``.
    """
    folder = resume if resume.is_dir() else resume.parent
    last, options = folder / "last.pt", folder / "config.yaml"
    if not last.is_file():
        if (folder / "journal.log").is_file():
            raise Fault(f"--resume {resume}: holds a search for hyper-parameters; --tune N --resume {resume} goes on")
        raise Fault(f"--resume {resume}: no {last}; a run that has finished an epoch has one; start it anew")
    fixed = sorted(config.model_fields_set - movable)
    if fixed:
        names = ", ".join(map(option_name, fixed))
        raise Fault(f"{names}: cannot change in a run that goes on; leave it out, or start anew with --weights {last}")
    checkpoint = load_checkpoint(last)
    if checkpoint.training is None:
        raise Fault(f"{last}: holds weights only; start a new run with --weights {last}")
    begun = "search.py" if "alphas" in checkpoint.training else "train.py"
    if begun != script:
        raise Fault(f"{last}: was begun by {begun}; python {begun} --resume {folder} goes on with it")
    described = folder / DESCRIBED[script]
    if described.is_file() and dump(parse(described)) != dump(checkpoint.spec):
        raise Fault(
            f"{described}: describes another model than {last} holds; put back the one of this run, or start anew with"
            f" --cfg {described}"
        )
    model = type(config)
    here = {name: getattr(config, name) for name in config.model_fields_set}
    return checked(model, {**read_options(options, model), **here}, str(options)), folder, checkpoint
