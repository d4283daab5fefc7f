"""Kill a trainer at seeded random moments, start it again until it is done, and look for any difference.

    python tests/campaign.py                       # both trainers, 1 and 2 ranks, 20 kills each
    python tests/campaign.py --kills 100 --ranks 2 --seed 7

Every run must end with a log and checkpoints that are the same, bit for bit, as those of a run that nobody stopped,
and leave nothing else. The short form of it is part of the tests (test_faults.py).
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import SUITE, build_toy, flags, user_environment
from toy import launcher

CONSTANTS = {
    "MICRO_BSIZE": 2,
    "LORA_RANK": 16,
    "LR": 1e-3,
    "TOTAL_TRAIN_STEPS": 30,
    "SAVE_EVERY": 12,
    "STATE_EVERY": 4,
}
MOMENTS = (
    "before the first step",
    "in a step",
    "saving a state",
    "saving a checkpoint",
    "at the end",
    "one rank",
)
TIMEOUT = 60  # seconds in which a launch must end after one of its ranks has died


def command(script, ranks, toy_folder, **constants):
    """The command line of a short run of `script` that saves often."""
    python = [sys.executable] if ranks == 1 else launcher(ranks)
    data = {
        "MODEL_NAME": toy_folder / "model",
        "PT_FILE": toy_folder / "train.pt",
        "CKPT_DIR": "run",
    }
    return [
        *python,
        str(SUITE / f"train_{script}.py"),
        *flags(**{**data, **CONSTANTS, **constants}),
    ]


def start(script, ranks, toy_folder, folder):
    """The Popen of such a run in a session of its own; what it prints goes to `folder`.printed."""
    with open(f"{folder}.printed", "a") as printed:
        how = {"cwd": folder, "env": user_environment(), "stdout": printed, "stderr": printed}
        return subprocess.Popen(command(script, ranks, toy_folder), start_new_session=True, **how)


def alive(session):
    """The processes of a session that are no zombies, {pid: command line}."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own_session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(own_session) == session and state != "Z":
                found[int(stat.parent.name)] = (stat.parent / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_for(moment, folder, run, rng):
    """Sleep until a random point of `moment`; False if the run ended before."""
    log, partial = folder / "run_logs" / "train_loss.csv", folder / "run_state" / "partial"
    begun, began = log.stat().st_mtime_ns if log.exists() else 0, time.time()
    delay = rng.uniform(0, 3)
    came = {
        "before the first step": lambda: time.time() - began > delay,
        "in a step": lambda: (
            log.exists() and log.stat().st_mtime_ns > begun and log.read_text().count("\n") > 1
        ),
        "saving a state": lambda: any(partial.glob("*states.pt")),
        "saving a checkpoint": lambda: (partial / "config.json").exists(),
        "at the end": lambda: (folder / f"run_step{CONSTANTS['TOTAL_TRAIN_STEPS']:04d}").exists(),
        "one rank": lambda: time.time() - began > delay and ranks_of(run),
    }[moment]
    while not came():
        if run.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.5))))
    return run.poll() is None


def ranks_of(run):
    """The process ids of the ranks that a launcher has started."""
    return [
        pid
        for pid, words in alive(run.pid).items()
        if any(word.startswith("--local_rank=") for word in words)
    ]


def kill(run, moment, rng):
    """SIGKILL to all processes of a run, or to one rank, behind which the others must end by themselves."""
    if moment == "one rank" and (ranks := ranks_of(run)):
        os.kill(rng.choice(sorted(ranks)), signal.SIGKILL)
        assert run.wait(timeout=TIMEOUT) != 0
    else:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    deadline = time.time() + TIMEOUT
    while alive(run.pid):
        assert time.time() < deadline, f"still there: {alive(run.pid)}"
        time.sleep(0.01)


def check_remains(folder, whole):
    """After a kill: no checkpoint that differs from the `whole` ones, and a state as long as the run is unfinished."""
    left = contents(folder)
    for name, digest in left.items():
        if name.startswith("run_step"):
            assert whole[name] == digest, name
    for name in {name.split("/")[0] for name in left if name.startswith("run_step")}:
        assert {n for n in left if n.startswith(name)} == {
            n for n in whole if n.startswith(name)
        }, name
    finished = f"run_step{CONSTANTS['TOTAL_TRAIN_STEPS']:04d}" in {
        name.split("/")[0] for name in left
    }
    begun = (folder / "run_logs").exists()
    assert (folder / "run_state").exists() or finished or not begun


def survive(begin, folder, moments, rng, whole):
    """Start a run again and again, killed at each of `moments` in turn, until it is done; the Counter of those met."""
    folder.mkdir()
    met = Counter()
    for moment in moments:
        run = begin(folder)
        if not wait_for(moment, folder, run, rng):
            break
        kill(run, moment, rng)
        met[moment] += 1
        check_remains(folder, whole)
        if (
            not (folder / "run_state").exists() and (folder / "run_logs").exists()
        ):  # killed when all was done
            return met
    else:
        run = begin(folder)
    assert run.wait(timeout=300) == 0, Path(f"{folder}.printed").read_text()
    return met


def contents(folder):
    """{name: SHA-256} of all files below `folder`, but for a state that is being removed."""
    files = {
        str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()
    }
    kept = {name: path for name, path in files.items() if not name.startswith("run_logs/state/")}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in kept.items()}


def campaign(script, ranks, kills, seed, toy_folder, folder):
    """Kill runs of `script` on so many `ranks` until so many `kills` have hit one; the Counter of the moments met."""
    rng, met, number = random.Random(f"{script} {ranks} {seed}"), Counter(), 0
    moments = MOMENTS if ranks > 1 else MOMENTS[:-1]  # one rank alone has no others
    begin = lambda where: start(script, ranks, toy_folder, where)
    (reference := folder / "reference").mkdir(parents=True)
    assert begin(reference).wait(timeout=300) == 0, Path(f"{reference}.printed").read_text()
    whole = contents(reference)
    while met.total() < kills:
        run = folder / f"run{(number := number + 1)}"
        met += survive(
            begin,
            run,
            rng.choices(moments, k=min(kills - met.total(), rng.randint(1, 8))),
            rng,
            whole,
        )
        assert contents(run) == whole, set(contents(run).items()) ^ set(whole.items())
        shutil.rmtree(run)
        print(
            f"{script}, {ranks} ranks, {number} runs, {met.total()} kills: {dict(met)}", flush=True
        )
    return met


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=20,
        help="of each trainer on each number of ranks (%(default)s)",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(1 2)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        toy_folder = build_toy(Path(folder) / "toy")
        for script in ("blockwise", "fullseq"):
            for ranks in args.ranks:
                campaign(
                    script,
                    ranks,
                    args.kills,
                    args.seed,
                    toy_folder,
                    Path(folder) / f"{script}{ranks}",
                )
    print("nothing was lost, and every result is the same, bit for bit")


if __name__ == "__main__":
    main()
