"""A benchmark's configuration from YAML: parts laid over what they share, every slip named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from anomalyst.benchmark import SHIPPED, shipped
from anomalyst.benchmark.checks import check
from anomalyst.benchmark.config import (
    Benchmark,
    BenchmarkConfig,
    MethodKeys,
    Setting,
    Variant,
    validate,
)
from anomalyst.errors import InputError, unknown
from anomalyst.methods.base import find_method

_SHORTHAND = {"method": "methods"}  # a key for one value, and that of the list it stands for
_LISTS = ("methods", "data", "test")


def load_benchmark(
    source: str | Path,
    *,
    root: Path | None = None,
    data: Sequence[Path] = (),
    test: Sequence[Path] = (),
    steps: int | None = None,
    backbone: str | None = None,
    weights: str | None = None,
) -> Benchmark:
    """Read a configuration: a YAML file, or the name of one that is shipped.

    Parameters
    ----------
    root
        Where the relative folders that it names lie; by default where the command runs.
    data, test
        Folders instead of those that it names; a benchmark of several parts takes none.
    steps
        Training steps instead of all steps and epochs that it names, in the parts that train.
    backbone, weights
        Instead of those that it names.

    Raises
    ------
    InputError
        No such configuration, not YAML, or anything wrong with its keys and values.
    """
    path = _find(source)
    raw = _read(path)
    instead: dict[str, Any] = {"backbone": backbone, "weights": weights}
    if data:
        instead["data"] = list(data)
    if test:
        instead["test"] = list(test)
    instead = {key: value for key, value in instead.items() if value is not None}
    given = _parts(raw, path.name)
    if len(given) > 1 and (data or test):
        raise InputError(
            f"{path.name}: has {len(given)} parts with folders of their own: give the folder that "
            "holds them with --root"
        )
    parts = [_part(values | instead, root, path.name) for values in given]
    if steps is not None:
        if not any(map(_trains, parts)):
            raise InputError(f"{path.name}: no method of it takes gradient steps: leave steps out")
        parts = [_with_steps(part, steps) if _trains(part) else part for part in parts]
    return Benchmark(parts[0].title, tuple(parts))


def _parts(raw: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the values of each part, over what the parts share."""
    known = [key for key in BenchmarkConfig.model_fields if key != "name"]
    _check_keys(raw, [*known, *_SHORTHAND, "parts"], where)
    common = _prepared({key: value for key, value in raw.items() if key != "parts"}, where)
    if "parts" not in raw:
        return [common]
    parts = raw["parts"]
    if (
        not isinstance(parts, list)
        or not all(isinstance(part, dict) for part in parts)
        or not parts
    ):
        raise InputError(f"{where}: parts: must be a list of mappings, each with a name")
    merged: list[dict[str, Any]] = []
    for part in parts:
        name = str(part.get("name") or "")
        if not name or name.casefold() in {str(m["name"]).casefold() for m in merged}:
            raise InputError(f"{where}: parts: each needs a name of its own, not {name!r}")
        here = f"{where}: part {name!r}"
        allowed = [key for key in BenchmarkConfig.model_fields if key != "title"]
        _check_keys(part, [*allowed, *_SHORTHAND], f"part {name!r} in {where}")
        values = _prepared(part, here)
        shared = common.get("published")
        if isinstance(shared, dict) and isinstance(values.get("published"), dict):
            values["published"] = shared | values["published"]
        merged.append(common | values | {"name": name})
    return merged


def _part(values: Mapping[str, Any], root: Path | None, where: str) -> BenchmarkConfig:
    """Return one part, checked; its folders are below the root."""
    name = values.get("name")
    where = f"{where}: part {name!r}" if name else where
    config = validate(BenchmarkConfig, values, where)
    if root is not None:
        folders = {key: tuple(root / p for p in getattr(config, key)) for key in ("data", "test")}
        config = config.model_copy(update=folders)
    if config.setting == "multi" and len(config.data) > 1:
        config = config.model_copy(update={"setting": "super-multi"})
    check(config, where)
    return config


def present(benchmark: Benchmark, skip: Callable[[str], object] | None = None) -> Benchmark:
    """Return the benchmark with the parts whose folders are missing set aside.

    Parameters
    ----------
    skip
        Called with a line on each part set aside.

    Raises
    ------
    InputError
        A folder is missing and ``skip`` is None, or each part misses one.
    """
    missing = {
        part.name: [str(p) for p in (*part.data, *part.test) if not p.expanduser().is_dir()]
        for part in benchmark.parts
    }
    if not any(missing.values()):
        return benchmark
    if skip is None or all(missing.values()):
        names = ", ".join(dict.fromkeys(path for paths in missing.values() for path in paths))
        more = ", or leave its part out with --skip-missing" if not all(missing.values()) else ""
        raise InputError(f"{names}: no such folder; say with --root where the data lies{more}")
    for name, paths in missing.items():
        if paths:
            skip(f"{name}: left out, no such folder: {', '.join(paths)}")
    there = tuple(part for part in benchmark.parts if not missing[part.name])
    left_out = tuple(part for part in benchmark.parts if missing[part.name])
    return Benchmark(benchmark.title, there, left_out)


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


def _trains(part: BenchmarkConfig) -> bool:
    """Tell whether any gradient steps are taken for a part."""
    return part.bundle is None and any(find_method(name).trains_on for name in part.methods)


def _with_steps(part: BenchmarkConfig, steps: int) -> BenchmarkConfig:
    """Return the part with these steps, in place of all steps and epochs that it names."""

    def kept(options: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in options.items() if key not in ("steps", "epochs")}

    def without(keys: MethodKeys) -> MethodKeys:
        given = {"steps": None, "epochs": None, "options": kept(keys.options)}
        return keys.model_copy(update=given)

    return part.model_copy(
        update={
            "steps": steps,
            "epochs": None,
            "options": kept(part.options),
            "variants": tuple(
                v.model_copy(update={"options": kept(v.options)}) for v in part.variants
            ),
            "by_method": {name: without(keys) for name, keys in part.by_method.items()},
        }
    )
