"""Short passages to score and to continue."""

import datasets

TEXTS = (
    "Rivers begin in the mountains and end in the sea.",
    "One two three four five six seven eight nine ten.",
    "The baker opened his shop before the sun came up, and the whole street smelled of bread.",
    "Snow fell. " * 24,
)


def passages(**_):
    rows = [{"text": text, "start": text[: len(text) // 2].strip()} for text in TEXTS]
    return {"test": datasets.Dataset.from_list(rows)}
