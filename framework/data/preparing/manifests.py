"""Manifests of prepared rows: written beside them, found by settings, and compared with the files that exist."""

import collections
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from ...base import paths
from ...base.errors import UserError
from ...base.json_files import parse_object
from ...dataset import Split
from ..reading.malformed import Rejects

NAME = "manifest.json"
STARTED = "started.json"  # the manifest of the rows with which training can start
Manifest = dict[str, Any]
_KEYS = {"settings", "tokenizer", "splits", "shards", "ranges", "content", "stopped"}
_SHOWN = 3


def to_text(content: dict[str, Any]) -> str:
    """Return indented JSON."""
    return json.dumps(content, indent=2) + "\n"


def digest(content: Any) -> str:
    """Return a hash of JSON content, 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read(folder: epath.Path, name: str = NAME) -> Manifest:
    """Read the manifest of a folder of rows, or with `name` another of its JSON files.

    Raises:
      UserError: the file is corrupt.
    """
    try:
        content = parse_object((folder / name).read_text())
    except UnicodeDecodeError:
        content = None
    if content is None or (name in (NAME, STARTED) and not content.keys() >= _KEYS):
        raise UserError(f"{folder / name}: is corrupt. Delete {folder} and prepare again.")
    return content


def find(place: epath.Path, settings: dict[str, Any]) -> tuple[epath.Path, Manifest]:
    """Return the folder in `place` with rows of these settings, for any state of the source, and its manifest.

    Raises:
      UserError: there is no such folder or more than one, or some of its files are missing.
    """
    prepare = f"run shampax prepare --output={place}"
    folders = [path for path in paths.listed(place) if path.name.startswith("rows-") and path.is_dir()]
    found = {folder: read(folder) for folder in folders if (folder / NAME).exists()}
    if not found:
        why = "has shards but no manifest: some are still missing" if folders else "holds no prepared data"
        raise UserError(f"data.prepared={place}: {why}. To make them, {prepare}.")
    same = [folder for folder, manifest in found.items() if not _differences(manifest["settings"], settings)]
    if not same:
        nearest = min((_differences(manifest["settings"], settings) for manifest in found.values()), key=len)
        raise UserError(
            f"data.prepared={place}: was prepared with other settings: {', '.join(nearest[:_SHOWN])}. Set these knobs "
            f"as they were, or {prepare} with this config."
        )
    if len(same) > 1:
        names = ", ".join(folder.name for folder in same)
        raise UserError(f"data.prepared={place}: {names} have these settings, of changed sources. Delete all but one.")
    (folder,) = same
    gone = missing(folder, found[folder])
    if gone:
        raise UserError(
            f"{folder}: {len(gone)} of {len(found[folder]['shards'])} shards are missing or have another size "
            f"({', '.join(gone[:_SHOWN])}). Copy them again, or {prepare} to make them."
        )
    return folder, found[folder]


def of_split(folder: epath.Path, manifest: Manifest, split: Split) -> dict[epath.Path, int]:
    """Return the shards that hold rows of a split, with their row counts."""
    own = [shard for shard in manifest["shards"] if shard["split"] in (split, None)]
    return {folder / shard["file"]: int(shard["rows"]) for shard in own}


def missing(folder: epath.Path, manifest: Manifest) -> list[str]:
    """Return the shards that are missing or, in a local folder, have another size."""
    there = {path.name for path in folder.iterdir()}
    return [
        shard["file"]
        for shard in manifest["shards"]
        if shard["file"] not in there
        or (paths.is_local(folder) and os.stat(folder / shard["file"]).st_size != shard["bytes"])
    ]


def totals(notes: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add up the notes of shards by split, training first."""
    totals = {}
    for split in sorted({note["split"] for note in notes}, key=lambda split: split == "heldout"):
        rejects, counts, dropped, rows = Rejects(0), collections.Counter(), collections.Counter(), 0
        for note in (note for note in notes if note["split"] == split):
            rejects.add(**note["malformed"])
            counts.update(note["counts"])
            dropped.update(note["dropped"])
            rows += note["rows"]
        name = split or "train and heldout"
        totals[name] = {**counts, "rows": rows, "dropped": dict(dropped), "malformed": rejects.to_json()}
    return totals


def _differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return a text such as "sequence_length 128 there, 256 here" for each setting that differs."""
    keys = sorted((stored.keys() | wanted.keys()) - {"fingerprint"})
    pairs = [(key, stored.get(key, "absent"), wanted.get(key, "absent")) for key in keys]
    return [f"{key} {there!r} there, {here!r} here" for key, there, here in pairs if there != here]
