"""Compare a model's answer with the right one: exact match, and math-verify in its own process.

    echo '["The answer is: 1/2", "0.5"]' | python experiments/tasks/grade.py      # prints [true]

Reads lines of JSON `[text, gold]` and prints `[verdict]` for each. A symbolic comparison can take
forever, or all memory, and cannot be interrupted in the middle of a computation in C. So the system
ends the process after SECONDS on one line, and limits its memory to GIGABYTES. `equal_in_time`
starts such a process, and another one after a line that ended it.
Guide: experiments/docs/evaluation.md
"""

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
from functools import cache

SECONDS = 30
GIGABYTES = 4
MARKS = re.compile(r"the answer is(?::|(?!:))[ \t]*(?=\S)|####[ \t]*(?=\S)|\\boxed\{", re.I)
END = re.compile(r"\.?(?:\n|$)|\.\s")  # of an answer: the line's end or a full stop


def final_answer(text):
    """The text after the last "The answer is" or "####", or in the last \\boxed{}; else None."""
    for mark in reversed(list(MARKS.finditer(text))):
        rest = text[mark.end() :]
        if mark[0] == "\\boxed{":
            answer = up_to_brace(rest)
        else:
            answer = END.split(rest)[0]
        if answer is not None:
            return answer.strip()
    return None


def up_to_brace(text):
    """`text` up to the brace that closes one opened before it; None if there is none."""
    depth = 1
    for end, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        if depth == 0:
            return text[:end]
    return None


def exact_match(text, gold):
    """Whether the final answer of `text` is `gold`, apart from blanks, commas and dollar signs."""
    answer = final_answer(text)
    return answer is not None and normalize(answer) == normalize(gold)


def normalize(answer):
    return re.sub(r"[\s,$]", "", answer)


def equal(text, gold):
    """Whether math-verify finds the final answer of `text` equal to `gold`.

    A text without a final answer is compared by its last mathematical expression.
    """
    from math_verify import parse, verify  # here: only the process that compares needs it

    answer = final_answer(text)
    if answer is None:
        found = parse(text, parsing_timeout=None)
    else:
        found = parse(as_formula(answer), parsing_timeout=None)
    expected = parse(as_formula(gold), parsing_timeout=None)
    return verify(expected, found, timeout_seconds=None)


def as_formula(answer):
    return answer if "$" in answer else f"${answer}$"


def equal_in_time(text, gold):
    """The verdict of `equal`, from the other process: True, False, or None.

    None is for a comparison that ended the process, by taking too long. One that runs out of memory
    is False, and so is one that math-verify cannot read.
    """
    process = start_process(os.getpid())
    try:
        process.stdin.write(json.dumps([text, gold]).encode() + b"\n")
        return json.loads(process.stdout.readline())[0]
    except (BrokenPipeError, json.JSONDecodeError):
        process.kill()
        process.wait()
        start_process.cache_clear()
        return None


@cache
def start_process(_):
    """The process that compares for this one, and ends with it, as its input ends."""
    pipe = subprocess.PIPE
    command = [sys.executable, __file__]
    null = subprocess.DEVNULL
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, bufsize=0)


def check():
    """Check that math-verify works.

    Raises:
        SystemExit: if it does not.
    """
    if not equal_in_time("1", "1") or equal_in_time("1", "2") is not False:
        command = f'echo \'["1", "1"]\' | {sys.executable} {__file__}'
        sys.exit(f"math-verify does not work here; to see why: {command}")


def main(_):
    """Answer lines until the input ends; there are no flags but --help."""
    import math_verify  # noqa: F401 (slow, and may fail: before the first line's time is counted)

    limit = GIGABYTES << 30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for line in sys.stdin:
        signal.alarm(SECONDS)  # nothing handles this signal: it ends the process
        try:
            verdict = equal(*json.loads(line))
        except Exception:  # math-verify and sympy fail in many ways on what is not mathematics
            verdict = False
        signal.alarm(0)
        print(json.dumps([verdict]), flush=True)


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse_args())
