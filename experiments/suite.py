"""Where the suite is, and how its scripts are started as a user would start them.

The other scripts of this folder import it before `pt` and the trainers, which lie one folder up.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def launcher(ranks):
    """The launcher's part of a command line, on a port that nothing else on this machine uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ["deepspeed", "--num_gpus", str(ranks), "--master_port", str(port)]


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
