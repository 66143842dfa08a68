"""What pydantic cannot know of a benchmark: what methods and settings allow, before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from anomalyst.benchmark.config import (
    ELSEWHERE,
    SHIPPED_BUNDLE,
    UNSEEN,
    BenchmarkConfig,
    Keys,
    Setting,
    Variant,
    validate,
)
from anomalyst.errors import InputError, unknown
from anomalyst.methods import REGISTRY
from anomalyst.methods.base import MethodSpec, find_method, make_options
from anomalyst.settings import DETECTOR_KEYS

_OF_TRAINING = ("data", "variants", "options", "steps", "epochs", "precision")
_OF_DETECTOR = ("preset", "backbone", "weights", "image_size")


class _DetectorKeys(Keys):
    """The settings of a detector that stand among the options."""

    layers: tuple[int, ...] | None = Field(None, min_length=1)
    resize: int | None = Field(None, ge=1)
    square: bool = False


def check(config: BenchmarkConfig, where: str) -> None:
    """Raise `InputError` for the first thing that cannot be run."""
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
    for name in config.by_method:  # a part may leave out a method that the others have
        if name not in REGISTRY:
            raise unknown(f"method in by_method of {where}", name, REGISTRY)
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
    few_or_all = few or config.setting == "leave-one-out"
    if few and not config.shots:
        raise InputError(f"{where}: shots: {config.setting} needs a list, such as [1, 2, 4]")
    if config.shots and not few_or_all:
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


def _check_setting(setting: Setting, spec: MethodSpec, where: str) -> None:
    if _can(spec, setting):
        return
    able = [other.name for other in REGISTRY.values() if _can(other, setting)]
    why = ""
    if setting == "generalist":
        why = ": it is trained on the very products that it judges, not given references later"
    elif spec.generalist:
        why = ": it is trained on other products than it judges, it can do generalist only"
    raise InputError(
        f"{where}: setting: {spec.name} cannot do {setting}{why}; those that can: "
        + ", ".join(able)
    )


def _can(spec: MethodSpec, setting: Setting) -> bool:
    """Tell whether a method can be run in a setting."""
    if setting == "generalist":
        return spec.generalist or not spec.trains_on
    if spec.generalist:
        return False
    if setting in UNSEEN:
        return spec.zero_shot
    return spec.few_shot or not setting.startswith("few-shot")


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
    validate(_DetectorKeys, keys, f"{where}: variant {variant.name!r}")
