"""The functions of the tasks metamath, metamath_gsm8k and metamath_math500.

They also work without evaluate.py: `lm_eval --include_path experiments/tasks --tasks ...`.
Guide: experiments/docs/evaluation.md
"""

import json
import math
import re
import sys
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # experiments/

import suite  # noqa: F401 (pt.py is another folder up)
from datasets import Dataset
from tasks import grade

import pt

QUERIES = ("query", "question", "problem")  # columns of MetaMathQA, GSM8K and MATH-500
SOLUTIONS = ("answer", "response")
ONE_PER_LINE = "the file must hold one JSON object per line"
UNFINISHED = re.compile(r"(?:the answer is:?|####)\W*$|^nan$", re.I)
PROSE = re.compile(r"\n|[a-z]{2}[.!?]\s+[A-Z]")  # what no final answer has: lines, sentences


def read_problems(path, **_):
    """The problems of a .jsonl file, as the harness takes a dataset.

    Read here: the datasets library would guess types, and keep a copy of a file that changes.

    Raises:
        OSError, ValueError: if the file or one of its lines cannot be read.
    """
    with open(path, encoding="utf-8") as file:
        lines = [(number, line) for number, line in enumerate(file, start=1) if line.strip()]
    problems = [make_problem(parse(line, number), f"line {number}") for number, line in lines]
    if not problems:
        raise ValueError("it has no problems")
    return {"test": Dataset.from_list(problems)}


def parse(line, number):
    """The content of a line of JSON; a ValueError names the line."""
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON ({error}); {ONE_PER_LINE}") from None


def process_docs(rows):
    """The problems of a hub dataset, as a Dataset with the columns query and answer."""
    problems = [make_problem(row, f"problem {n}") for n, row in enumerate(rows, start=1)]
    return Dataset.from_list(problems)


def make_problem(row, place):
    """A row as {"query", "answer"}, with the final answer alone.

    Raises:
        ValueError: if the row at this place has no text or no final answer.
    """
    columns = row if isinstance(row, dict) else {}
    query = next((columns[name] for name in QUERIES if columns.get(name) is not None), None)
    solution = next((columns[name] for name in SOLUTIONS if columns.get(name) is not None), None)
    has_text = isinstance(query, str) and query.strip()
    if not has_text or isinstance(solution, bool) or not isinstance(solution, str | int | float):
        needed = f"a text in {' or '.join(QUERIES)}, and {' or '.join(SOLUTIONS)}"
        remedy = "" if isinstance(row, dict) else f"; {ONE_PER_LINE}"
        raise ValueError(f"{place} needs {needed}: {row!r:.80}{remedy}")
    return {"query": query, "answer": read_answer(solution, place)}


def read_answer(solution, place):
    """The final answer, as a text, of a solution in words, or of one that is the answer itself.

    Raises:
        ValueError: if there is none.
    """
    if isinstance(solution, float):
        if not math.isfinite(solution):
            raise ValueError(f"{place} has no final answer: {solution}; give a finite number")
        return digits(solution)
    text = str(solution).strip()
    answer = grade.final_answer(text)
    if answer is None:
        answer = text
    if not answer or PROSE.search(answer) or UNFINISHED.search(text):
        raise ValueError(
            f'{place} has no final answer: {text[-80:]!r}; let it end in "The answer is: ..."'
        )
    return answer


def digits(number):
    """A number as it is written without an exponent: 1e22 is 1 and 22 zeros."""
    return format(Decimal(str(number)), "f")


def doc_to_text(problem):
    return pt.PROMPT.format(query=problem["query"])


def process_results(problem, answers):
    """What the answer to a problem is worth, 0 or 1 each; ungraded: math-verify took too long."""
    verdict = grade.equal_in_time(answers[0], problem["answer"])
    return {
        "math_verify": int(verdict is True),
        "exact_match": int(grade.exact_match(answers[0], problem["answer"])),
        "ungraded": int(verdict is None),
    }
