"""The names of classes that the datasets library keeps beside its numbers (ClassLabel), in its folders and in its Parquet files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Names = dict[str, list[str]]  # of each field that has classes
DATASET = "dataset_info.json"


def class_labels(file: Path) -> Names:
    """{} where nothing is declared."""
    if file.is_dir():
        return _declared(_json((file / DATASET).read_bytes(), str(file / DATASET)).get("features"))
    if file.name.lower().endswith(".parquet"):
        return _declared(_parquet_features(file))
    return {}


def named(fields: dict[str, Any], labels: Names, place: str) -> dict[str, Any]:
    """The fields with names for numbers, in lists too; None for -1, which stands for no class."""
    for field, names in labels.items():
        value = fields.get(field)
        fields[field] = (
            [_name(v, names, field, place) for v in value]
            if isinstance(value, list)
            else _name(value, names, field, place)
        )
    return fields


def _name(value: Any, names: list[str], field: str, place: str) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if not -1 <= value < len(names):
        raise ValueError(
            f"{place}: {field}={value} is none of the {len(names)} classes that the data declare, {', '.join(names[:5])}, ..."
        )
    return None if value == -1 else names[value]


def _declared(features: Any) -> Names:
    declared: Names = {}
    for field, feature in features.items() if isinstance(features, dict) else ():
        if isinstance(feature, list) and len(feature) == 1:
            feature = {"feature": feature[0]}
        if isinstance(feature, dict):
            feature = feature if "_type" in feature and feature["_type"] == "ClassLabel" else feature.get("feature")
        names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            declared[field] = names
    return declared


def _json(text: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place} is not valid JSON: {error}") from error
    return value if isinstance(value, dict) else {}


def _parquet_features(file: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        return {}  # the reader of the rows says what is wrong, here and below
    try:
        metadata = pyarrow.parquet.read_schema(file).metadata or {}
    except (pyarrow.ArrowException, OSError):  # plain OSErrors too, of damaged headers
        return {}
    info = _json(metadata.get(b"huggingface", b"{}"), f"the description in {file}").get("info")
    return info.get("features") if isinstance(info, dict) else {}
