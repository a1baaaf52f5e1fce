"""A fingerprint of a run's metadata, kept among the root's attributes.

Chunks carry a checksum each, and the ``zarr.json`` of every node has a second
copy in the consolidated metadata of the root. The root's own attributes (plan,
config, provenance) have neither, so a flipped bit in them would go unseen. The
attribute :data:`FINGERPRINT` covers them and the consolidated copies. It is an
ordinary attribute: readers that do not know it are not disturbed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from zarr.abc.store import Store
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync

FINGERPRINT = "metadata_sha256"
"""Name of the root attribute that holds the fingerprint."""

ROOT_KEY = "zarr.json"


def canonical(document: object) -> str:
    r"""Write a JSON value in one fixed way: sorted keys, no spaces, ASCII; NaN is written as ``NaN``.

    Equal strings mean equal values, also for NaN, which ``==`` finds unequal.

    Examples
    --------
    >>> canonical({"b": [1, float("nan")], "a": "é"})
    '{"a":"\\u00e9","b":[1,NaN]}'
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def fingerprint(root: Mapping[str, Any]) -> str:
    """SHA-256 of the root's ``zarr.json`` without the fingerprint itself.

    The parsed document is taken in its :func:`canonical` form, so indentation
    and the order of keys do not matter.

    Parameters
    ----------
    root
        The parsed document: attributes, consolidated metadata and the rest.

    Returns
    -------
    str
        64 hexadecimal digits.

    Examples
    --------
    >>> root = {"attributes": {"config": {}}, "node_type": "group"}
    >>> fingerprint(root) == fingerprint(sealed(root))
    True
    """
    return _hashed_without(root, FINGERPRINT)


def sealed(root: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document with its fingerprint among the attributes.

    Examples
    --------
    >>> fingerprint_holds(sealed({"attributes": {"config": {}}}))
    True
    """
    return {**root, "attributes": {**root["attributes"], FINGERPRINT: fingerprint(root)}}


def fingerprint_holds(root: Mapping[str, Any]) -> bool | None:
    """Whether the document is as it was sealed; None if it carries no fingerprint.

    A fingerprint whose name was damaged is still recognised by its value: the
    document then does not hold.

    Examples
    --------
    >>> root = sealed({"attributes": {"config": {"learning_rate": 0.1}}})
    >>> root["attributes"]["config"] = {"learning_rate": 0.3}
    >>> fingerprint_holds(root)
    False
    >>> fingerprint_holds({"attributes": {}}) is None
    True
    """
    attributes = root["attributes"]
    if FINGERPRINT in attributes:
        return bool(attributes[FINGERPRINT] == fingerprint(root))
    renamed = any(_hashed_without(root, name) == value for name, value in attributes.items())
    return False if renamed else None


def seal_store(store: Store) -> None:
    """Write the fingerprint of a store, at its creation or after its metadata were changed on purpose.

    Parameters
    ----------
    store
        A writable store whose root ``zarr.json`` is complete.

    Raises
    ------
    FileNotFoundError
        If the store has no root ``zarr.json``.

    Examples
    --------
    >>> import zarr
    >>> store = zarr.storage.MemoryStore()
    >>> root = zarr.create_group(store, attributes={"config": {}})
    >>> seal_store(store)
    >>> sorted(zarr.open_group(store, mode="r").attrs)
    ['config', 'metadata_sha256']
    """
    prototype = default_buffer_prototype()
    raw = sync(store.get(ROOT_KEY, prototype=prototype))
    if raw is None:
        raise FileNotFoundError(f"{store} has no {ROOT_KEY}: create the run before it is sealed")
    # written as parsed, not through zarr: what is hashed has to be what is stored
    text = json.dumps(sealed(json.loads(raw.to_bytes())), indent=2)
    sync(store.set(ROOT_KEY, prototype.buffer.from_bytes(text.encode())))


def _hashed_without(root: Mapping[str, Any], name: str) -> str:
    attributes = {key: value for key, value in root["attributes"].items() if key != name}
    return hashlib.sha256(canonical({**root, "attributes": attributes}).encode()).hexdigest()
