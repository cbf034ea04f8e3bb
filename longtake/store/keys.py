"""Content addresses: what identifies a media file, a clip of it, a caption.

Keys are 16 bytes of SHA-256. Equal keys mean equal content, wherever and whenever it was encoded.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from longtake.data import Manifest, MediaError
from longtake.data.files import open_regular
from longtake.data.source import position_of
from longtake.store.recipe import Recipe

KEY_BYTES = 16
NO_KEY = b"\0" * KEY_BYTES
Identity = Literal["sha256", "size-mtime"]
_CHUNK_BYTES = 1 << 20
_THREADS = 16


def file_keys(
    manifest: Manifest, identity: Identity, *, share: int = 0, shares: int = 1
) -> tuple[np.ndarray, dict[int, MediaError]]:
    """What identifies each sample's file, uint8 (samples, 16), and the samples that have none.

    By `sha256` of the bytes, or by name, size and time of change, which reads nothing. Several
    samples of one file cost one look. With `shares`, every so many-th file; the others stay zero.
    """
    samples: dict[str, list[int]] = {}
    for sample_id, path in enumerate(manifest.texts["path"]):
        samples.setdefault(path, []).append(sample_id)
    paths = list(samples)[share::shares]

    def look(path: str) -> bytes | MediaError:
        try:
            return _file_key(manifest, samples[path][0], identity)
        except MediaError as error:
            return MediaError(path, error.reason, error.text)

    keys = np.zeros((len(manifest), KEY_BYTES), np.uint8)
    failures = {}
    # Threads: hashing and waiting for the disk both leave the interpreter to the others.
    with ThreadPoolExecutor(_THREADS) as threads:
        for path, found in zip(paths, threads.map(look, paths), strict=True):
            if isinstance(found, MediaError):
                failures |= dict.fromkeys(samples[path], found)
            else:
                keys[samples[path]] = np.frombuffer(found, np.uint8)
    return keys, failures


def _file_key(manifest: Manifest, sample_id: int, identity: Identity) -> bytes:
    sample = manifest[sample_id]
    with open_regular(manifest.real_path(sample)) as file:
        if identity == "size-mtime":
            status = os.fstat(file.fileno())
            text = json.dumps([sample.path, status.st_size, status.st_mtime_ns])
            return hashlib.sha256(text.encode()).digest()[:KEY_BYTES]
        digest = hashlib.sha256()
        try:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        except OSError as error:
            text = f"cannot be read ({error.strerror})"
            raise MediaError(sample.path, "unreadable", text) from error
        return digest.digest()[:KEY_BYTES]


def clip_keys(
    recipe: Recipe, clip_digest: bytes, file_key: bytes, start: float, end: float | None
) -> bytes:
    """The keys of a sample's clips for a bucket, one behind the other in the order of variants."""
    base = hashlib.sha256(clip_digest + file_key)
    base.update(json.dumps([start, end]).encode())
    keys = []
    for place in range(recipe.places):
        for flip in (False, True) if recipe.flips else (False,):
            variant = base.copy()
            position = position_of(place, recipe.places)
            variant.update(json.dumps([position, flip]).encode())
            keys.append(variant.digest()[:KEY_BYTES])
    return b"".join(keys)


def text_key(text_digest: bytes, caption: str) -> bytes:
    """The key of a caption's embedding."""
    return hashlib.sha256(text_digest + caption.encode()).digest()[:KEY_BYTES]


def list_digest(keys: Iterable[bytes]) -> str:
    """16 hex digits that name a list of keys."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(key)
    return digest.hexdigest()[:16]
