"""Manifests: what is noted of prepared rows, beside them; found by settings, and compared with what is there."""

import hashlib
import json
import os
from typing import Any

from etils import epath

from ...base import paths
from ...base.errors import UserError
from ...base.json_files import parse_object
from ...dataset import Split

NAME = "manifest.json"
Manifest = dict[str, Any]
_SHOWN = 3


def to_text(content: dict[str, Any]) -> str:
    """Indented JSON."""
    return json.dumps(content, indent=2) + "\n"


def digest(content: Any) -> str:
    """Hash of what JSON can hold, 12 hexadecimal digits."""
    return sha256(json.dumps(content, sort_keys=True))[:12]


def sha256(text: str) -> str:
    """Hash of a text, "" for none."""
    return hashlib.sha256(text.encode()).hexdigest() if text else ""


def read(folder: epath.Path) -> Manifest:
    """The manifest of a folder of rows.

    Raises:
      UserError: it is damaged.
    """
    path = folder / NAME
    try:
        manifest = parse_object(path.read_text())
    except UnicodeDecodeError:
        manifest = None
    if manifest is None or not _is_whole(manifest):
        raise UserError(f"{path} is damaged; remove {folder}, and it is made again")
    return manifest


def find(place: epath.Path, settings: dict[str, Any]) -> tuple[epath.Path, Manifest]:
    """The folder of `place` that holds rows of these settings, whatever state of the source they were made of.

    Raises:
      UserError: there is none, or more than one, or files of it are missing; the message says how the nearest differs.
    """
    folders = sorted(path for path in place.glob("rows-*") if path.is_dir()) if place.exists() else []
    held = {folder: read(folder) for folder in folders if (folder / NAME).exists()}
    if not held:
        why = "has shards but no manifest: not all are made yet" if folders else "holds no prepared data"
        raise UserError(f"data.prepared {place} {why}; run python -m shampax.launch.prepare --output={place}")
    same = [folder for folder, manifest in held.items() if not _differences(manifest["settings"], settings)]
    if not same:
        nearest = min((_differences(manifest["settings"], settings) for manifest in held.values()), key=len)
        raise UserError(
            f"data.prepared {place} is prepared with other settings: {', '.join(nearest[:_SHOWN])}; set data's "
            f"knobs as they were, or run python -m shampax.launch.prepare --output={place} with this config"
        )
    if len(same) > 1:
        raise UserError(
            f"data.prepared {place} holds {len(same)} preparations of these settings, of different states of the "
            f"source: {', '.join(folder.name for folder in same)}; remove all but one"
        )
    gone = missing(same[0], held[same[0]])
    if gone:
        total = len(held[same[0]]["shards"])
        raise UserError(
            f"{same[0]} lacks {len(gone)} of its {total} shards, or they have another size "
            f"({', '.join(gone[:_SHOWN])}); copy them again, or run python -m shampax.launch.prepare "
            f"--output={place}, which makes what is missing"
        )
    return same[0], held[same[0]]


def of_split(folder: epath.Path, manifest: Manifest, split: Split) -> tuple[list[epath.Path], list[int]]:
    """The shards that rows of a split are in, and how many rows they have."""
    own = [shard for shard in manifest["shards"] if shard["split"] in (split, None)]
    return [folder / shard["file"] for shard in own], [int(shard["rows"]) for shard in own]


def missing(folder: epath.Path, manifest: Manifest) -> list[str]:
    """Shards that are not there; of a local folder also those of another size."""
    there = {path.name for path in folder.iterdir()}
    return [
        shard["file"]
        for shard in manifest["shards"]
        if shard["file"] not in there
        or (paths.is_local(folder) and os.stat(folder / shard["file"]).st_size != shard["bytes"])
    ]


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A text like "sequence_length 128 there, 256 here" for each setting that differs, the source's state apart."""
    keys = sorted((stored.keys() | wanted.keys()) - {"fingerprint"})
    return [
        f"{key} {stored.get(key, 'absent')!r} there, {wanted.get(key, 'absent')!r} here"
        for key in keys
        if stored.get(key, "absent") != wanted.get(key, "absent")
    ]


def _is_whole(manifest: Manifest) -> bool:
    try:
        return (
            all({"file", "split", "rows", "bytes", "content"} <= shard.keys() for shard in manifest["shards"])
            and all({"count", "first"} == total["malformed"].keys() for total in manifest["splits"].values())
            and all(isinstance(total["dropped"], dict) for total in manifest["splits"].values())
            and isinstance(manifest["content"], str)
            and isinstance(manifest["settings"], dict)
            and {"file", "sha256"} == manifest["tokenizer"].keys()
        )
    except (KeyError, TypeError, AttributeError):
        return False
