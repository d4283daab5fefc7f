"""The functions of the tasks metamath, metamath_gsm8k and metamath_math500.

They also work without evaluate.py: `lm_eval --include_path experiments/tasks --tasks ...`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grade
import suite  # noqa: F401 (pt.py is another folder up)
from datasets import Dataset

import pt

QUERIES = ("query", "question", "problem")  # columns of MetaMathQA, GSM8K and MATH-500
SOLUTIONS = ("answer", "response")


def process_docs(rows):
    """The problems of a dataset, with columns query and answer, the final answer alone.

    Raises:
        ValueError: if there are none, or one has no text or no final answer.
    """
    problems = []
    for number, row in enumerate(rows, start=1):
        query = first(row, QUERIES)
        solution = str(first(row, SOLUTIONS))
        if not isinstance(query, str) or not query.strip():
            columns = f"{', '.join(QUERIES)}, and {' or '.join(SOLUTIONS)}"
            raise ValueError(f"problem {number} needs a text, in one of {columns}: {row!r:.80}")
        # a worked solution, as GSM8K's are, or the final answer itself
        answer = grade.final_answer(solution) or solution.strip()
        if answer in ("", "None") or "\n" in answer:
            raise ValueError(
                f"problem {number} has no final answer: {solution[-80:]!r}; "
                'let it end in "The answer is: ..."'
            )
        problems.append({"query": query, "answer": answer})
    if not problems:
        raise ValueError("it has no problems")
    return Dataset.from_list(problems)


def first(row, columns):
    """The first of these columns that the row has a value in; None if there is none."""
    for column in columns:
        if row.get(column) is not None:
            return row[column]
    return None


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
