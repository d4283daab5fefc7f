"""What the scripts of this folder share: where the suite is, their flags, how a user would start
them, hashes, and files that appear only when they are whole.

They import it before `pt` and the trainers, which lie one folder up.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def make_parser(doc):
    """A parser of flags for a script; its --help begins with the script's docstring `doc`."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=doc, formatter_class=raw, allow_abbrev=False)


def check_lowest(parser, args, **lowest):
    """End with the parser's message if a flag that was given is below its lowest value."""
    for name, least in lowest.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name} {value}: must be at least {least}")


def check_new(parser, output, *endings):
    """End with the parser's message unless `output` with these endings can be made anew."""
    if not os.path.isdir(os.path.dirname(output) or "."):
        parser.error(f"--output {output}: its folder does not exist; make it, or give another")
    for ending in endings:
        if os.path.exists(f"{output}.{ending}"):
            parser.error(f"--output {output}: {output}.{ending} exists; give another")


def launcher(ranks, gpus=()):
    """The launcher's part of a command line, on a port that nothing else on this machine uses.

    `gpus` are their numbers, one per rank: with --num_gpus it ignores CUDA_VISIBLE_DEVICES.
    """
    devices = ["--num_gpus", str(ranks)]
    if gpus:
        devices = ["--include", "localhost:" + ",".join(gpus)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["deepspeed", *devices, "--master_port", str(port)]


def flags(values):
    """A dict as command-line words: {"LR": 1e-3} gives ["--LR", "0.001"]."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value)]
    return words


def user_environment(**changes):
    """The environment of a user who has activated this interpreter's virtual environment."""
    scripts = os.path.dirname(sys.executable)
    return {**os.environ, "PATH": scripts + os.pathsep + os.environ["PATH"], **changes}


def run(command, folder=".", output=None, **environment):
    """Run a command line in `folder`; its output goes to the file `output`, or to the terminal.

    Returns:
        its exit status.
    """
    command = [str(word) for word in command]
    env = user_environment(**environment)
    return subprocess.run(command, cwd=folder, env=env, stdout=output, stderr=output).returncode


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


def write_csv(path, columns, rows):
    """Write `rows`, a dict each, to `path`, in the same way."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_json(path, content):
    """Write `content` as JSON to `path`, in the same way."""
    write_text(path, json.dumps(content, indent=2) + "\n")
