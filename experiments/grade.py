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

SECONDS, GIGABYTES = 30, 4


def final_answer(text):
    """The final answer in `text`: behind its last "The answer is", else "####", else in its last \\boxed{}; or None."""
    for marker in ("the answer is(?::|(?!:))", "####"):
        if found := re.findall(rf"^.*{marker}[ \t]*(\S.*)$", text, re.I | re.M):
            return found[-1].strip().removesuffix(".").strip()
    start, depth = text.rfind("\\boxed{"), 0
    for end in range(start, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if text[end] == "}" and depth == 0:
            return text[start + len("\\boxed{") : end].strip()
    return None


def exact_match(text, gold):
    """Whether the final answer of `text` is `gold`, letter by letter but for blanks, commas and dollar signs."""
    plain = lambda answer: re.sub(r"[\s,$]", "", answer)
    answer = final_answer(text)
    return answer is not None and plain(answer) == plain(gold)


def equal(text, gold):
    """Whether math-verify finds the final answer of `text`, or else its last expression, equal to `gold`."""
    from math_verify import parse, verify  # imported here: evaluate.py only starts the process

    formula = lambda answer: parse(answer if "$" in answer else f"${answer}$", parsing_timeout=None)
    answer = final_answer(text)
    found = parse(text, parsing_timeout=None) if answer is None else formula(answer)
    return verify(formula(gold), found, timeout_seconds=None)


def grade(pairs):
    """Yields for each (text, gold) True or False, or None where the comparison was ended for time or memory."""
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
    how = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "bufsize": 0}
    with subprocess.Popen([sys.executable, __file__], **how) as process:
        for pair in pairs:
            try:
                process.stdin.write(json.dumps(pair).encode() + b"\n")
                verdict = json.loads(process.stdout.readline())[0]
            except (BrokenPipeError, json.JSONDecodeError):
                process.kill()
                return
            yield verdict


def main():
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
