"""What a benchmark measures, read from YAML: frozen, and every slip named before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from anomalyst.benchmark import SHIPPED, shipped
from anomalyst.errors import InputError, unknown
from anomalyst.evaluation import EVAL_SIZE
from anomalyst.features.backbones import find_backbone
from anomalyst.methods.base import MethodSpec, find_method, make_options
from anomalyst.settings import DETECTOR_KEYS, detector_settings
from anomalyst.training_setup import FULL, Precision

Setting = Literal[
    "single", "multi", "super-multi", "few-shot", "few-shot-multi", "generalist", "zero-shot"
]
ONE_EACH = ("single", "few-shot")  # settings with a model of its own for each category
ELSEWHERE = ("generalist", "zero-shot")  # tested on other data than is trained on
SHIPPED_BUNDLE = "shipped"
_SHORTHAND = {
    "method": "methods"
}  # a key for one value, and the key of the list that it stands for
_LISTS = ("methods", "data", "test")
_OF_TRAINING = ("data", "variants", "options", "steps", "epochs", "precision")
_OF_DETECTOR = ("preset", "backbone", "weights", "image_size")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Variant(_Part):
    """One row of an ablation: options laid over the common ones, or over those of a training."""

    name: str = Field(min_length=1)
    options: dict[str, Any] = {}
    at_test: dict[str, Any] = {}


class _DetectorKeys(_Part):
    """The settings of a detector that stand among the options."""

    layers: tuple[int, ...] | None = Field(None, min_length=1)
    resize: int | None = Field(None, ge=1)
    square: bool = False


class BenchmarkConfig(_Part):
    """A benchmark; the keys are described in the documentation of the command."""

    title: str = Field(min_length=1)
    methods: tuple[str, ...] = Field(min_length=1)
    setting: Setting
    data: tuple[Path, ...] = ()
    test: tuple[Path, ...] = ()
    categories: tuple[str, ...] | None = Field(None, min_length=1)
    preset: str | None = None
    backbone: str = "auto"
    weights: str | None = None
    image_size: int | None = Field(None, ge=1)
    options: dict[str, Any] = {}
    steps: int | None = Field(None, ge=1)
    epochs: int | None = Field(None, ge=1)
    precision: Precision = FULL
    bundle: str | None = None
    shots: tuple[Annotated[int, Field(ge=1)], ...] = ()
    abnormal: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    references: Literal["category", "type"] = "category"
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = Field((0,), min_length=1)
    eval_size: int | None = Field(EVAL_SIZE, ge=1)
    variants: tuple[Variant, ...] = Field((Variant(name="default"),), min_length=1)

    def arguments(self, method: str, variant: Variant) -> dict[str, Any]:
        """Return the keyword arguments of the `Detector` of one method and variant.

        The preset comes first, then the common settings and options, then the variant's.
        """
        trains = find_method(method).trains_on is not None
        chosen = detector_settings(
            method,
            self.preset,
            [],
            backbone=self.backbone,
            image_size=self.image_size,
            steps=self.steps if trains else None,
            epochs=self.epochs if trains else None,
        )
        for given in (self.options, variant.options):
            if "epochs" in given and "steps" in chosen["options"]:
                chosen["options"]["steps"] = None  # the later of the two decides
            for key, value in given.items():
                (chosen if key in DETECTOR_KEYS else chosen["options"])[key] = value
        chosen["backbone"] = find_backbone(find_method(method).backbone_for(chosen["backbone"])).id
        return chosen | {"weights": self.weights}


def load_config(
    source: str | Path,
    *,
    data: Sequence[Path] = (),
    test: Sequence[Path] = (),
    steps: int | None = None,
    backbone: str | None = None,
    weights: str | None = None,
) -> BenchmarkConfig:
    """Read a configuration: a YAML file, or the name of one that is shipped.

    Parameters
    ----------
    data, test
        Folders instead of those that it names.
    steps
        Training steps instead of all steps and epochs that it names.
    backbone, weights
        Instead of those that it names.

    Raises
    ------
    InputError
        No such configuration, not YAML, or anything wrong with its keys and values.
    """
    path = _find(source)
    raw = _read(path)
    _check_keys(raw, [*BenchmarkConfig.model_fields, *_SHORTHAND], path.name)
    values = _prepared(raw, path.name)
    if data:
        values["data"] = list(data)
    if test:
        values["test"] = list(test)
    values |= {k: v for k, v in (("backbone", backbone), ("weights", weights)) if v is not None}
    if steps is not None:
        values |= {"steps": steps, "epochs": None}
    config: BenchmarkConfig = _validate(BenchmarkConfig, values, path.name)
    if steps is not None:
        config = _without_lengths(config)
    if config.setting == "multi" and len(config.data) > 1:
        config = config.model_copy(update={"setting": "super-multi"})
    _check(config, path.name)
    return config


def _find(source: str | Path) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    name = str(source)
    if name in shipped():
        return SHIPPED / f"{name}.yaml"
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise InputError(f"{source}: no such file")
    raise unknown("configuration", name, shipped())


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or "not text"
        raise InputError(f"{path.name}{where}: not valid YAML ({what})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path.name}: must be a mapping of keys to values, such as title: ...")
    return raw


def _check_keys(given: Mapping[Any, Any], known: Sequence[str], where: str) -> None:
    for key in given:
        if key not in known:
            raise unknown(f"key of {where}", str(key), known)


def _prepared(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the values with one method or folder made a list, and the names in them checked."""
    values = dict(raw)
    for one, many in _SHORTHAND.items():
        if one in values:
            if many in values:
                raise InputError(f"{where}: give {one} or {many}, not both")
            values[many] = [values.pop(one)]
    for key in _LISTS:
        if isinstance(values.get(key), str):
            values[key] = [values[key]]
    if values.get("eval_size") == "original":
        values["eval_size"] = None
    if isinstance(values.get("setting"), str) and values["setting"] not in get_args(Setting):
        raise unknown(f"setting in {where}", values["setting"], get_args(Setting))
    variants = values.get("variants")
    for variant in variants if isinstance(variants, list) else []:
        if isinstance(variant, dict):
            _check_keys(variant, list(Variant.model_fields), f"a variant in {where}")
    return values


def _validate(model: type[Any], values: Mapping[str, Any], where: str) -> Any:
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = str(first["input"])
        got = "" if first["type"] == "missing" or len(given) > 60 else f", not {given!r}"
        raise InputError(f"{where}: {key}: {first['msg']}{got}") from None


def _without_lengths(config: BenchmarkConfig) -> BenchmarkConfig:
    """Drop the steps and epochs among the options: the command line gave others."""

    def kept(options: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in options.items() if key not in ("steps", "epochs")}

    variants = tuple(v.model_copy(update={"options": kept(v.options)}) for v in config.variants)
    return config.model_copy(update={"options": kept(config.options), "variants": variants})


# ---- what pydantic cannot know ------------------------------------------------------------------


def _check(config: BenchmarkConfig, where: str) -> None:
    _check_lists(config, where)
    specs = []
    for name in config.methods:
        try:
            specs.append(find_method(name))
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    for spec in specs:
        _check_setting(config.setting, spec, where)
    if config.bundle is not None:
        _check_bundle(config, specs, where)
    _check_data(config, specs, where)
    _check_lengths(config, specs, where)
    _check_abnormal(config, specs, where)
    for spec in specs:
        of_bundle = config.bundle is not None and spec.trains_on is not None
        for variant in () if of_bundle else config.variants:
            _check_options(config, spec, variant, where)


def _check_lists(config: BenchmarkConfig, where: str) -> None:
    names = [variant.name.casefold() for variant in config.variants]
    lists: dict[str, Sequence[object]] = {
        "methods": config.methods,
        "categories": config.categories or (),
        "shots": config.shots,
        "abnormal": config.abnormal,
        "seeds": config.seeds,
        "variants": names,
    }
    for key, values in lists.items():
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            raise InputError(f"{where}: {key}: {twice[0]!r} stands there twice")
    few = config.setting.startswith("few-shot") or config.setting == "generalist"
    if few and not config.shots:
        raise InputError(f"{where}: shots: {config.setting} needs a list, such as [1, 2, 4]")
    if config.shots and not few:
        raise InputError(f"{where}: shots: {config.setting} takes none, leave them out")
    if config.setting != "generalist":
        given = [key for key in ("abnormal", "references", "bundle") if _is_given(config, key)]
        given += ["at_test" for variant in config.variants if variant.at_test]
        if given:
            raise InputError(f"{where}: {given[0]}: only generalist takes it, leave it out")


def _is_given(config: BenchmarkConfig, key: str) -> bool:
    """Tell whether a key says anything else than leaving it out."""
    return bool(getattr(config, key) != BenchmarkConfig.model_fields[key].default)


def _check_bundle(config: BenchmarkConfig, specs: Sequence[MethodSpec], where: str) -> None:
    trained = [spec.name for spec in specs if spec.trains_on]
    if len(trained) != 1:
        raise InputError(
            f"{where}: bundle: holds one trained method: name one in methods, not {len(trained)}"
        )
    own = (*_OF_TRAINING, *(_OF_DETECTOR if len(specs) == 1 else ()))
    for key in own:
        if _is_given(config, key):
            raise InputError(
                f"{where}: {key}: the bundle is trained already, leave {key} or the bundle out"
            )
    if config.bundle != SHIPPED_BUNDLE and not Path(config.bundle or "").expanduser().exists():
        raise InputError(
            f"{where}: bundle: {config.bundle}: no such bundle; {SHIPPED_BUNDLE} is "
            "the one that comes with the package"
        )


def _check_data(config: BenchmarkConfig, specs: Sequence[MethodSpec], where: str) -> None:
    needed = config.setting not in ELSEWHERE or any(spec.trains_on for spec in specs)
    if needed and not config.data and config.bundle is None:
        raise InputError(f"{where}: names no data: give the folder with --data PATH")
    if config.data and not needed:
        names = " or ".join(config.methods)
        raise InputError(f"{where}: data: {names} is not trained on a source, leave it out")
    if config.setting == "super-multi" and len(config.data) < 2:
        raise InputError(f"{where}: data: super-multi needs two or more folders")
    if config.setting in ELSEWHERE:
        if not config.test:
            raise InputError(
                f"{where}: names no test data, which {config.setting} needs beside the training "
                "data: give the folder with --test PATH"
            )
        if {path.resolve() for path in config.data} & {path.resolve() for path in config.test}:
            raise InputError(f"{where}: test: {config.setting} is tested on data never trained on")


def _check_lengths(config: BenchmarkConfig, specs: Sequence[MethodSpec], where: str) -> None:
    if config.steps and config.epochs:
        raise InputError(f"{where}: steps and epochs say the same in two ways: give one of them")
    given = [key for key in ("steps", "epochs", "precision") if _is_given(config, key)]
    if given and not any(spec.trains_on for spec in specs):
        names = " or ".join(config.methods)
        raise InputError(f"{where}: {names} takes no gradient steps: leave {given[0]} out")


def _check_abnormal(config: BenchmarkConfig, specs: Sequence[MethodSpec], where: str) -> None:
    for spec in specs:
        if 0 not in config.abnormal and not spec.abnormal_references:
            raise InputError(
                f"{where}: abnormal: {spec.name} uses no abnormal references: put 0 into the list"
            )
    if config.references == "type" and config.abnormal == (0,):
        raise InputError(f"{where}: references: type needs abnormal references: add abnormal: [1]")


def _check_setting(setting: str, spec: MethodSpec, where: str) -> None:
    able = {"few-shot": spec.few_shot, "few-shot-multi": spec.few_shot, "zero-shot": spec.zero_shot}
    if not able.get(setting, True):
        raise InputError(
            f"{where}: setting: {spec.name} cannot do {setting}; `anomalyst methods` shows what can"
        )
    if setting == "generalist" and spec.trains_on and not spec.generalist:
        raise InputError(
            f"{where}: setting: {spec.name} cannot do generalist: it is trained on the very "
            "products that it judges, not given references of others later"
        )
    if setting != "generalist" and spec.generalist:
        raise InputError(
            f"{where}: setting: {spec.name} can do generalist only: it is trained on other "
            "products than it judges"
        )


def _check_options(config: BenchmarkConfig, spec: MethodSpec, variant: Variant, where: str) -> None:
    if variant.at_test and spec.trains_on is None:
        raise InputError(
            f"{where}: variant {variant.name!r}: at_test: {spec.name} takes no gradient steps: "
            "give its options under options"
        )
    try:
        chosen = config.arguments(spec.name, variant)
        make_options(spec.load(), chosen["options"] | variant.at_test)
    except InputError as error:
        raise InputError(f"{where}: variant {variant.name!r}: {error}") from None
    keys = {key: chosen[key] for key in DETECTOR_KEYS if key in chosen}
    _validate(_DetectorKeys, keys, f"{where}: variant {variant.name!r}")
