"""Is a model's answer right? Final answers, plain exact match, and math-verify in a process of its own.

    echo '["The answer is: 1/2", "0.5"]' | python experiments/grade.py      # -> [true]

Reads one JSON line `[text, gold]` after the other and prints `[verdict]` for each. Symbolic comparison can take
forever, or all memory: the process is ended by the system after SECONDS for one line, whatever it is doing, and has
GIGABYTES at most. `grade` starts a new one behind the line that was the end of it, whose verdict is then None.
"""

import json
import re
import resource
import signal
import subprocess
import sys
from functools import lru_cache

SECONDS, GIGABYTES = 30, 4
MARKS = re.compile(r"the answer is(?::|(?!:))[ \t]*(?=\S)|####[ \t]*(?=\S)|\\boxed\{", re.I)


def final_answer(text):
    """What the last "The answer is", "####" or \\boxed{} in `text` says, up to a full stop; None without any."""
    for mark in reversed(list(MARKS.finditer(text))):
        rest = text[mark.end() :]
        answer = (
            up_to_brace(rest) if mark[0] == "\\boxed{" else re.split(r"\.?(?:\n|$)|\.\s", rest)[0]
        )
        if answer is not None:
            return answer.strip()
    return None


def up_to_brace(text):
    """`text` up to the brace that closes one opened before it; None if there is none."""
    depth = 1
    for end, letter in enumerate(text):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return text[:end]
    return None


def exact_match(text, gold):
    """Whether the final answer of `text` is `gold`, letter by letter but for blanks, commas and dollar signs."""
    plain = lambda answer: re.sub(r"[\s,$]", "", answer)
    answer = final_answer(text)
    return answer is not None and plain(answer) == plain(gold)


def equal(text, gold):
    """Whether math-verify finds the final answer of `text`, or else its last expression, equal to `gold`."""
    from math_verify import parse, verify  # here: only the process that compares needs it

    formula = lambda answer: parse(answer if "$" in answer else f"${answer}$", parsing_timeout=None)
    answer = final_answer(text)
    found = parse(text, parsing_timeout=None) if answer is None else formula(answer)
    return verify(formula(gold), found, timeout_seconds=None)


def grade(pairs):
    """Yields for each (text, gold) True or False, or None where the comparison was the end of its process.

    It is that by taking too long. What runs out of memory is wrong, as is all that math-verify cannot read.
    """
    pairs = list(pairs)
    while pairs:
        for verdict in grade_in_a_process(list(pairs)):
            pairs.pop(0)
            yield verdict
        if pairs:  # the first of these was the end of the process
            pairs.pop(0)
            yield None


def grade_in_a_process(pairs):
    """Yields verdicts until all are given or the process has ended."""
    how = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.DEVNULL,
        "bufsize": 0,
    }
    with subprocess.Popen([sys.executable, __file__], **how) as process:
        for pair in pairs:
            try:
                process.stdin.write(json.dumps(pair).encode() + b"\n")
                verdict = json.loads(process.stdout.readline())[0]
            except (BrokenPipeError, json.JSONDecodeError):
                process.kill()
                return
            yield verdict


@lru_cache
def check():
    """Raises SystemExit if math-verify does not work here."""
    if list(grade([("1", "1"), ("1", "2")])) != [True, False]:
        sys.exit(
            f'math-verify does not work here; try `echo \'["1", "1"]\' | {sys.executable} {__file__}`'
        )


def main():
    import math_verify  # noqa: F401 (may take long, or fail, before the first comparison)

    resource.setrlimit(resource.RLIMIT_AS, (GIGABYTES << 30, GIGABYTES << 30))
    for line in sys.stdin:
        signal.alarm(SECONDS)  # nothing handles it: it ends the process
        try:
            verdict = equal(*json.loads(line))
        except Exception:  # math-verify and sympy fail in many ways on what is no mathematics
            verdict = False
        signal.alarm(0)
        print(json.dumps([verdict]), flush=True)


if __name__ == "__main__":
    main()
