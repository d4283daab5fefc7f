"""The functions of the tasks metamath, metamath_gsm8k and metamath_math500.

They also work without evaluate.py: `lm_eval --include_path experiments/tasks --tasks ...`.
Guide: experiments/docs/evaluation.md
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # experiments/

import suite  # noqa: F401 (pt.py is another folder up)
from datasets import Dataset
from tasks import grade

import pt

QUERIES = ("query", "question", "problem")  # columns of MetaMathQA, GSM8K and MATH-500
SOLUTIONS = ("answer", "response")


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
        raise ValueError(f"line {number} is not JSON ({error})") from None


def process_docs(rows):
    """The problems of a hub dataset, as a Dataset with the columns query and answer."""
    problems = [make_problem(row, f"problem {n}") for n, row in enumerate(rows, start=1)]
    return Dataset.from_list(problems)


def make_problem(row, place):
    """A row as {"query", "answer"}, with the final answer alone.

    Raises:
        ValueError: if the row at this place has no text or no final answer.
    """
    row = row if isinstance(row, dict) else {}
    query = next((row[name] for name in QUERIES if row.get(name) is not None), None)
    solution = next((row[name] for name in SOLUTIONS if row.get(name) is not None), None)
    texts = isinstance(query, str) and query.strip()
    if not texts or isinstance(solution, bool) or not isinstance(solution, str | int | float):
        columns = f"a text in {' or '.join(QUERIES)}, and {' or '.join(SOLUTIONS)}"
        raise ValueError(f"{place} needs {columns}: {row!r:.80}")
    # a worked solution, as GSM8K's are, or the final answer itself
    answer = grade.final_answer(str(solution)) or str(solution).strip()
    if not answer or "\n" in answer:
        raise ValueError(
            f"{place} has no final answer: {str(solution)[-80:]!r}; "
            'let it end in "The answer is: ..."'
        )
    return {"query": query, "answer": answer}


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
