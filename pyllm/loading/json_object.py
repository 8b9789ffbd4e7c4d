"""JSON objects from files that are not trusted."""

import json
from collections import Counter
from pathlib import Path

from .errors import LoadError


def read_json(path, what="a JSON object"):
    """The object in a JSON file; LoadError if it is not one."""
    try:
        return parse_object(path, Path(path).read_bytes(), what)
    except OSError as error:
        raise LoadError(path, f"expected {what}: {error.strerror}") from None


def parse_object(path, data, what):
    """A JSON object from bytes. A key that occurs twice is an error, not silently the last."""

    def unique(pairs):
        result = dict(pairs)
        if len(result) != len(pairs):
            twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise LoadError(path, f"expected {what}, the key {twice!r} occurs twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except LoadError:
        raise
    except (ValueError, RecursionError) as error:
        raise LoadError(path, f"expected {what}: {error}") from None
    if not isinstance(value, dict):
        raise LoadError(path, f"expected {what}, got a {type(value).__name__}")
    return value
