"""Hashes of texts and files, and files that appear only when they are whole."""

import hashlib
import json
import os


def digest(*texts):
    """The sha256 of texts, in hexadecimal."""
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


def file_digest(path):
    """The sha256 of a file's contents, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 24):  # a checkpoint's shard need not fit in memory
            total.update(piece)
    return total.hexdigest()


def write_text(path, text):
    """Write `text` to `path`. A reader sees the old file or the whole new one, never a part."""
    partial = f"{path}.{os.getpid()}.partial"  # other processes may write it too
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path, content):
    """Write `content` as JSON to `path`, in the same way."""
    write_text(path, json.dumps(content, indent=2) + "\n")
