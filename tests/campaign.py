"""Kill a trainer at seeded random moments, resume it until it is done, and look for any difference.

    python tests/campaign.py                       # each trainer, 1 and 2 ranks, 20 kills each
    python tests/campaign.py --kills 100 --ranks 2 --seed 7 --scripts lift

Every run must end with the log and the checkpoints, bit for bit, of a run that nobody stopped, and
leave nothing else. A short form of this is part of the tests (test_faults.py).
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers import (
    OF_AR_TOY,
    SUITE,
    build_ar_toy,
    build_toy,
    flags,
    kill,
    launcher,
    ranks_of,
    timeless,
    user_environment,
)

SCRIPTS = {
    "blockwise": SUITE / "train_blockwise.py",
    "fullseq": SUITE / "train_fullseq.py",
    "lift": SUITE / "experiments" / "train_lift.py",
    "opdlm": SUITE / "experiments" / "train_opdlm.py",
}
CONSTANTS = {
    "CKPT_DIR": "run",
    "MICRO_BSIZE": 2,
    "LORA_RANK": 16,
    "LR": 1e-3,
    "TOTAL_TRAIN_STEPS": 30,
    "SAVE_EVERY": 12,
    "STATE_EVERY": 4,
}
LAST = f"run_step{CONSTANTS['TOTAL_TRAIN_STEPS']:04d}"
MOMENTS = (
    "before the first step",
    "in a step",
    "saving a state",
    "saving a checkpoint",
    "at the end",
    "one rank",
    "the launcher",
)


def command(script, ranks, toy_folder, **changes):
    """The command line of a short run of `script` that saves often."""
    python = [sys.executable] if ranks == 1 else launcher(ranks)
    data = {"MODEL_NAME": toy_folder / "model", "DATA_PT": toy_folder / "train.pt"}
    values = data | CONSTANTS | changes
    if script == "opdlm":
        values |= OF_AR_TOY | {"STATE_EVERY": 1}  # rollouts
    return [*python, str(SCRIPTS[script]), *flags(**values)]


def start(script, ranks, toy_folder, folder):
    """The Popen of such a run in a session of its own; what it prints goes to `folder`.printed."""
    with open(f"{folder}.printed", "a") as printed:
        return subprocess.Popen(
            command(script, ranks, toy_folder),
            cwd=folder,
            env=user_environment(),
            stdout=printed,
            stderr=printed,
            start_new_session=True,
        )


# ------- moments
def is_saving_a_state(state):
    """Whether a folder of a step is there that latest.json does not name yet."""
    latest = state / "latest.json"
    named = json.loads(latest.read_text()) if latest.exists() else ""
    return any(folder.name != named and any(folder.iterdir()) for folder in state.glob("step*"))


def has_come(moment, folder, run, elapsed, delay, log_time):
    """Whether a run has come to the `moment` at which it is to be killed."""
    log = folder / "run_logs" / "train_loss.csv"
    state = folder / "run_logs" / "state"
    if moment == "before the first step":
        return elapsed > delay
    if moment == "in a step":
        is_new = log.exists() and log.stat().st_mtime_ns > log_time
        return is_new and log.read_text().count("\n") > 1
    if moment == "saving a state":
        return is_saving_a_state(state)
    if moment == "saving a checkpoint":
        return (state / "checkpoint" / "config.json").exists()
    if moment == "at the end":
        return (folder / LAST).exists()
    return elapsed > delay and bool(ranks_of(run))  # one rank, the launcher


def wait_for(moment, folder, run, rng):
    """Sleep until a random point of `moment`; False if the run ended before."""
    log = folder / "run_logs" / "train_loss.csv"
    log_time = log.stat().st_mtime_ns if log.exists() else 0
    began = time.time()
    delay = rng.uniform(0, 3)
    while True:
        try:
            if has_come(moment, folder, run, time.time() - began, delay, log_time):
                break
        except FileNotFoundError:  # removed between two looks
            pass
        if run.poll() is not None:
            return False
        time.sleep(0.0005)
    time.sleep(rng.choice((0, rng.uniform(0, 0.02), rng.uniform(0, 0.5))))
    return run.poll() is None


# ------- what is left


def contents(folder):
    """{name: SHA-256} of all files below `folder`, without those of a state."""
    digests = {}
    for path in Path(folder).rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith(("run_logs/state/", "run_logs/finished/")):
            content = timeless(path) if path.name == "rollouts.csv" else path.read_bytes()
            digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def check_remains(folder, whole):
    """After a kill: every checkpoint is whole, and there is a state while the run is unfinished."""
    left = contents(folder)
    steps = {name.split("/")[0] for name in left if name.startswith("run_step")}
    for step in steps:
        expected = {item for item in whole.items() if item[0].startswith(f"{step}/")}
        found = {item for item in left.items() if item[0].startswith(f"{step}/")}
        assert found == expected, found ^ expected
    has_begun = (folder / "run_logs").exists()
    assert (folder / "run_logs" / "state").exists() or LAST in steps or not has_begun


def survive(begin, folder, moments, rng, whole):
    """Resume a run again and again, killed at each of `moments`, until it is done.

    Returns:
        the Counter of the moments that were met.
    """
    folder.mkdir()
    met = Counter()
    for moment in moments:
        run = begin(folder)
        if not wait_for(moment, folder, run, rng):
            break
        kill(run, moment, rng)
        met[moment] += 1
        check_remains(folder, whole)
        if (folder / LAST).exists() and not (folder / "run_logs" / "state").exists():
            return met  # killed when all was done
    else:
        run = begin(folder)
    assert run.wait(timeout=300) == 0, Path(f"{folder}.printed").read_text()
    return met


def campaign(script, ranks, kills, seed, toy_folder, folder, moments=MOMENTS):
    """Kill runs of `script` on `ranks` until `kills` have hit one; a Counter of the moments."""
    rng = random.Random(f"{script} {ranks} {seed}")

    def begin(where):
        return start(script, ranks, toy_folder, where)

    reference = folder / "reference"
    reference.mkdir(parents=True)
    assert begin(reference).wait(timeout=300) == 0, Path(f"{reference}.printed").read_text()
    whole = contents(reference)
    met = Counter()
    number = 0
    while met.total() < kills:
        number += 1
        run = folder / f"run{number}"
        planned = rng.choices(moments, k=min(kills - met.total(), rng.randint(1, 8)))
        met += survive(begin, run, planned, rng, whole)
        assert contents(run) == whole, set(contents(run).items()) ^ set(whole.items())
        shutil.rmtree(run)
        print(
            f"{script}, {ranks} ranks, {number} runs, {met.total()} kills: {dict(met)}", flush=True
        )
    return met


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        for script in args.scripts:
            build = build_ar_toy if script == "opdlm" else build_toy
            toy_folder = build(Path(folder) / script)
            for ranks in args.ranks:
                where = Path(folder) / f"{script}{ranks}"
                moments = args.moments
                if ranks == 1:  # it has no launcher
                    moments = [x for x in moments if x not in ("one rank", "the launcher")]
                if moments:
                    campaign(script, ranks, args.kills, args.seed, toy_folder, where, moments)
    print("nothing was lost, and every result is the same, bit for bit")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kills = "of each trainer on each number of ranks (%(default)s)"
    parser.add_argument("--kills", type=int, default=20, help=kills)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="(1 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    moments = "of being killed (all)"
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=MOMENTS, help=moments)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
