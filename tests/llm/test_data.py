"""The corpus: what is in it, and what happens to it when a run is interrupted or a file damaged."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from offramp import EarlyExitModel, InputError, ModelError, StorageError
from offramp.llm.data import FIT_ROWS, CorpusPlan, batches, corpus_bytes, prepare_corpus
from offramp.llm.generating import _pick, continue_prompts
from offramp.llm.prompts import prompts as prompts_of
from offramp.llm.prompts import topics
from offramp.llm.sequences import TokenSequence, as_sequences, encode_prompts
from offramp.llm.states import teacher_forced
from offramp.llm.trunk import Trunk
from scipy import stats
from transformers import MistralConfig, MistralForCausalLM

PLAN = CorpusPlan(layers=(2, 4), tokens=2500, max_new_tokens=12, seed=9)


@pytest.fixture(scope="module")
def trunk(model):
    return Trunk(model)


@pytest.fixture(scope="module")
def starts():
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(6, 89, (3 + row % 5,), generator=generator) for row in range(150)]


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("shard-*.safetensors")}


def test_greedy_continuations_are_the_models(trunk, model, starts):
    ends = (7, 8, 9, 10, 11)
    written = continue_prompts(trunk, starts[:9], max_new_tokens=20, end_tokens=ends)
    for prompt, sequence in zip(starts, written.sequences, strict=False):
        own = model.generate(prompt[None], max_new_tokens=20, do_sample=False, eos_token_id=list(ends))[0]
        assert torch.equal(sequence.tokens, own)
        assert sequence.prompt_length == len(prompt)
    assert len({len(item.tokens) for item in written.sequences}) > 1


def test_greedy_continuations_of_a_shared_prefix_are_the_models_where_it_has_a_window(starts):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=89,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    model = MistralForCausalLM(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.mul_(7)
    prefix = torch.arange(20, 32)
    prompts = [torch.cat([prefix, start]) for start in starts[:9]]
    written = continue_prompts(Trunk(model), prompts, max_new_tokens=15)
    for prompt, sequence in zip(prompts, written.sequences, strict=True):
        own = model.generate(prompt[None], max_new_tokens=15, do_sample=False, eos_token_id=None)[0]
        assert torch.equal(sequence.tokens, own)


def test_samples_follow_the_temperature_of_their_row(trunk, starts):
    """Against the model's own probabilities, and able to fail: one temperature's samples do not fit another's."""
    rows, ids = 4000, starts[0]
    [states] = teacher_forced(trunk, [TokenSequence(torch.cat([ids, ids[:1]]), len(ids))], ())
    logits = trunk.logits(states.final)[0]
    written = continue_prompts(
        trunk,
        [ids] * rows,
        max_new_tokens=1,
        temperatures=[0.0, 0.5, 1.0, 1.0] * (rows // 4),
        generator=torch.Generator().manual_seed(3),
    )
    drawn = torch.stack([item.tokens[-1] for item in written.sequences]).view(-1, 4)
    assert (drawn[:, 0] == logits.argmax()).all()

    def p_value(tokens, temperature):
        expected = (logits / temperature).softmax(dim=-1).double() * len(tokens)
        counts = torch.bincount(tokens, minlength=len(logits)).double()
        likely = expected >= 5
        kept = [torch.cat([part[likely], part[~likely].sum()[None]]).numpy() for part in (counts, expected)]
        return stats.chisquare(kept[0], kept[1] * kept[0].sum() / kept[1].sum()).pvalue

    assert p_value(drawn[:, 1], 0.5) > 1e-3
    assert p_value(drawn[:, 2:].flatten(), 1.0) > 1e-3
    assert p_value(drawn[:, 2:].flatten(), 0.5) < 1e-9


def test_a_narrow_model_samples_what_a_wide_one_with_its_logits_would():
    """Temperatures are applied to float32, whatever the model computes in."""
    rows = torch.randn(6, 89, generator=torch.Generator().manual_seed(3)).bfloat16() * 4
    warm = torch.tensor([0.0, 0.7, 1.3, 0.7, 0.0, 1.0])
    drawn = [_pick(logits.clone(), warm, torch.Generator().manual_seed(4)) for logits in (rows, rows.float())]
    assert torch.equal(*drawn)


def test_a_model_that_says_nan_is_named(model, starts):
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5] = torch.nan
    with pytest.raises(ModelError, match=r"^model: its last layer gave logits that are not numbers"):
        continue_prompts(Trunk(broken), starts[:2], max_new_tokens=2)


@pytest.mark.parametrize(("shared", "together"), [(0, 1 << 18), (12, 1 << 18), (12, 3 * 89 + 5), (0, 1)])
def test_captured_states_are_those_of_a_pass_over_the_finished_text(
    trunk, starts, shared, together, monkeypatch
):
    monkeypatch.setattr("offramp.llm.generating._READ_TOGETHER", together)
    prefix = torch.arange(20, 20 + shared)
    written = continue_prompts(
        trunk,
        [torch.cat([prefix, start]) for start in starts[:8]],
        max_new_tokens=15,
        end_tokens=(7, 8, 9),
        temperatures=[0.0, 0.7] * 4,
        generator=torch.Generator().manual_seed(0),
        capture=(2, 4),
    )
    for index, sequence in enumerate(written.sequences):
        [states] = teacher_forced(trunk, [sequence], (2, 4))
        torch.testing.assert_close(written.final[index], states.final, rtol=1e-4, atol=1e-4)
        logits = trunk.logits(states.final)
        torch.testing.assert_close(written.log_normalizer[index], logits.logsumexp(-1), rtol=1e-4, atol=1e-4)
        assert torch.equal(written.top[index][:, 0].long(), logits.argmax(dim=-1))
        for layer in (2, 4):
            whole = states.exits[layer][0, :-1]
            torch.testing.assert_close(written.exits[layer][index], whole, rtol=1e-4, atol=1e-4)


def test_continuations_stop_at_the_context_window(trunk):
    [sequence] = continue_prompts(trunk, [torch.full((150,), 7)], max_new_tokens=50).sequences
    assert len(sequence.tokens) == 160


def test_a_row_stops_at_its_own_window_not_at_its_neighbours(trunk):
    prompts = [torch.full((150,), 7), torch.full((4,), 8), torch.full((140,), 9)]
    together = continue_prompts(trunk, prompts, max_new_tokens=30).sequences
    assert [item.generated for item in together] == [10, 30, 20]
    for prompt, item in zip(prompts, together, strict=True):
        [alone] = continue_prompts(trunk, [prompt], max_new_tokens=30).sequences
        assert torch.equal(item.tokens, alone.tokens)


def test_a_batch_holds_what_the_model_said_and_held(trunk, starts, tmp_path):
    corpus = prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
    assert corpus.rows >= PLAN.tokens
    assert len(corpus.shards) > 2
    picked = torch.tensor([0, len(corpus) - 1, 100, 5])
    batch = corpus.batch(picked, (2, 4))
    logits = trunk.logits(batch.final)
    torch.testing.assert_close(batch.log_normalizer, logits.logsumexp(dim=-1))
    assert torch.equal(batch.top[:, 0].long(), logits.argmax(dim=-1))
    assert int(corpus.top_counts(89, torch.arange(len(corpus))).sum()) == 8 * corpus.rows
    place = 0
    for row, number in enumerate(picked.tolist()):
        sequence = corpus.sequence(number)
        [states] = teacher_forced(trunk, [sequence], (2, 4))
        mine = slice(place, place + sequence.generated)
        place += sequence.generated
        torch.testing.assert_close(batch.final[mine], states.final, rtol=1e-4, atol=1e-4)
        assert (batch.picked[0][mine] == row).all()
        assert torch.equal(batch.picked[1][mine], states.picked[1])
        for layer in (2, 4):
            kept = batch.hidden[layer][row, : len(sequence.tokens) - 1]
            # Kept in 16 bits: 8 of significance.
            torch.testing.assert_close(kept.float(), states.exits[layer][0, :-1], rtol=2**-8, atol=1e-4)
    assert place == len(batch)


def test_the_split_keeps_prompts_whole_and_apart(trunk, starts, tmp_path):
    plan = CorpusPlan((2,), 2000, 6, 9)
    corpus = prepare_corpus(trunk, plan, tmp_path, prompts=starts[:60])
    train, watched = corpus.split()
    assert len(train) + len(watched) == len(corpus) > 240
    assert 0 < len(watched) < 0.1 * len(corpus)
    begun = [
        {tuple(corpus.sequence(int(n)).tokens[:3].tolist()) for n in numbers} for numbers in (train, watched)
    ]
    assert not begun[0] & begun[1]


def test_a_topic_held_back_is_held_back_with_all_prompts_about_it(trunk, starts, tmp_path):
    of = [place % 30 for place in range(60)]
    corpus = prepare_corpus(trunk, CorpusPlan((2,), 600, 6, 9), tmp_path, prompts=starts[:60], topics=of)
    first = {tuple(prompt.tolist()): topic for prompt, topic in zip(starts[:60], of, strict=True)}

    def about(numbers):
        found = [corpus.sequence(int(number)) for number in numbers]
        return {first[tuple(item.tokens[: item.prompt_length].tolist())] for item in found}

    train, watched = map(about, corpus.split())
    assert train == set(range(30)) - {0, 25}
    assert watched == {0, 25}


@pytest.mark.parametrize("own", [False, True])
def test_texts_that_are_equal_are_on_one_side_of_the_split(trunk, starts, tmp_path, own):
    texts = [starts[place % 40] for place in range(120)]
    text = {"sequences": as_sequences(texts, None, max_positions=160)} if own else {"prompts": texts}
    corpus = prepare_corpus(trunk, CorpusPlan((2,), 900, 6, 9), tmp_path, **text)
    sides = [
        {
            tuple(item.tokens[: None if own else item.prompt_length].tolist())
            for item in map(corpus.sequence, side)
        }
        for side in (numbers.tolist() for numbers in corpus.split())
    ]
    assert len(sides[0]) + len(sides[1]) == 40
    assert sides[1]


def test_what_is_counted_and_fitted_is_of_the_sequences_asked_for(trunk, starts, tmp_path, monkeypatch):
    corpus = prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
    numbers = torch.tensor([3, 100, 101, len(corpus) - 1])
    batch = corpus.batch(numbers, (2,))
    counts = torch.bincount(batch.top.flatten(), minlength=89)
    assert torch.equal(corpus.top_counts(89, numbers), counts)
    assert torch.equal(corpus.fit_rows(trunk, 2, numbers), batch.hidden[2][batch.picked])
    assert torch.equal(corpus.fit_rows(trunk, 6, numbers), batch.final)
    # The first shards have the states that maps are fitted to; that some rows are left out asks for no other shard's.
    first = len(corpus.shards[0])
    monkeypatch.setattr("offramp.llm.data.FIT_ROWS", corpus.shards[0].rows)
    assert len(corpus.fit_rows(trunk, 3, torch.arange(5, len(corpus)))) < corpus.shards[0].rows < FIT_ROWS
    assert [3 in shard.hidden for shard in corpus.shards[:2]] == [True, False]
    # Unless they have nothing.
    later = torch.arange(first, len(corpus))
    assert len(corpus.fit_rows(trunk, 3, later)) == min(corpus.shards[0].rows, corpus.shards[1].rows)


class Lengths:
    """A tokenizer of words by their length."""

    chat_template = None

    def __call__(self, text):
        return {"input_ids": [6 + len(word) for word in text.split()]}


def test_shipped_prompts_keep_their_order_and_a_users_are_mixed(model, monkeypatch):
    ee, given = EarlyExitModel(model, Lengths(), layers=(2,)), []

    def prepared(*_, prompts, topics, **__):
        given.append(([prompt.tolist() for prompt in prompts], topics))
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.llm.model.prepare_corpus", prepared)
    own = ["x" * number for number in range(1, 60)]
    for prompts in (None, own, own):
        with pytest.raises(KeyboardInterrupt):
            ee.train_heads(10, prompts=prompts)
    shipped, mixed, again = given
    assert shipped == ([Lengths()(text)["input_ids"] for text in prompts_of("training")], topics("training"))
    assert mixed == again
    assert mixed[1] is None
    assert sorted(mixed[0]) == [[6 + len(text)] for text in own] != mixed[0]


def test_batches_are_whole_sequences_in_another_order_each_epoch():
    generated = torch.tensor([5, 1, 9, 3, 7, 2, 2, 8, 40, 1])
    numbers = torch.tensor([8, 0, 1, 2, 4, 5, 6, 7, 9])
    orders = []
    for epoch in range(3):
        found = batches(numbers, generated[numbers], 10, seed=3, epoch=epoch)
        assert sorted(torch.cat(found).tolist()) == sorted(numbers.tolist())
        assert all(len(batch) for batch in found)
        # A batch is full, but for its last sequence and the last batch.
        assert all(int(generated[batch[:-1]].sum()) < 20 for batch in found)
        assert sum(int(generated[batch].sum()) >= 5 for batch in found) >= 3
        orders.append(torch.cat(found).tolist())
    assert orders[0] != orders[1] != orders[2]
    again = batches(numbers, generated[numbers], 10, seed=3, epoch=1)
    assert torch.cat(again).tolist() == orders[1]


def test_other_layers_and_fewer_or_more_tokens_use_what_is_there(trunk, starts, tmp_path, monkeypatch):
    whole = prepare_corpus(trunk, CorpusPlan((2, 3, 4), 1500, 12, 9), tmp_path / "whole", prompts=starts)
    prepare_corpus(trunk, CorpusPlan((2, 4), 1500, 12, 9), tmp_path / "other", prompts=starts)

    def refuse(*_args, **_kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr("offramp.llm.data.continue_prompts", refuse)
    added = prepare_corpus(trunk, CorpusPlan((3, 4), 1500, 12, 9), tmp_path / "other", prompts=starts)
    for number in (0, 70, len(whole) - 1):
        mine, theirs = (corpus.batch(torch.tensor([number]), (3,)).hidden[3] for corpus in (added, whole))
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2**-7, atol=1e-3)
    monkeypatch.setattr(trunk, "run", refuse)
    fewer = prepare_corpus(trunk, CorpusPlan((2,), 700, 12, 9), tmp_path / "other", prompts=starts)
    assert 700 <= fewer.rows < 1500
    assert (
        prepare_corpus(trunk, CorpusPlan((4, 3), 1500, 12, 9), tmp_path / "other", prompts=starts).rows
        == added.rows
    )
    for layer in (2, 6, 4, 5):
        assert len(fewer.fit_rows(trunk, layer, torch.arange(len(fewer)))) == fewer.rows
    monkeypatch.undo()
    more = prepare_corpus(trunk, CorpusPlan((2, 4), 2500, 12, 9), tmp_path / "other", prompts=starts)
    assert more.rows >= 2500
    assert torch.equal(more.sequence(5).tokens, whole.sequence(5).tokens)


def test_the_size_is_told_before(trunk, starts, tmp_path, monkeypatch):
    plan = CorpusPlan((2, 4), 2500, 12, 9)
    told = corpus_bytes(trunk, plan, prompts=starts)
    prepare_corpus(trunk, plan, tmp_path / "a", prompts=starts)
    assert told == pytest.approx(sum(map(len, shards(tmp_path / "a").values())), rel=0.1)
    monkeypatch.setattr("offramp.llm.data.shutil.disk_usage", lambda _: SimpleNamespace(free=told // 2))
    with pytest.raises(StorageError, match="GB free"):
        prepare_corpus(trunk, plan, tmp_path / "b", prompts=starts)
    assert not shards(tmp_path / "b")
    prepare_corpus(trunk, plan, tmp_path / "a", prompts=starts)  # nothing is missing, so nothing is needed
    monkeypatch.setattr("offramp.llm.data.shutil.disk_usage", lambda _: SimpleNamespace(free=told // 100))
    prepare_corpus(trunk, plan, tmp_path / "a", prompts=starts)  # not even the layer that heads are fitted to
    # What is there of other layers makes no room for these.
    other = CorpusPlan((1, 3), 2500, 12, 9)
    monkeypatch.setattr("offramp.llm.data.shutil.disk_usage", lambda _: SimpleNamespace(free=told // 10))
    with pytest.raises(StorageError, match="GB free"):
        prepare_corpus(trunk, other, tmp_path / "a", prompts=starts)


def test_an_interrupted_corpus_is_completed_to_the_same_bytes(trunk, starts, tmp_path):
    prepare_corpus(trunk, PLAN, tmp_path / "whole", prompts=starts)

    def interrupt(_stage, done, _total):
        if done > 900:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(trunk, PLAN, tmp_path / "cut", prompts=starts, progress=interrupt)
    assert 0 < len(shards(tmp_path / "cut")) < len(shards(tmp_path / "whole"))
    prepare_corpus(trunk, PLAN, tmp_path / "cut", prompts=starts)
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_long_prompts_are_continued_fewer_at_a_time(trunk, starts, tmp_path, monkeypatch):
    sizes = []
    prompts = [start.repeat(1 + 5 * (place % 50 == 49)) for place, start in enumerate(starts)]

    def recording(trunk, rows, **settings):
        sizes.append((len(rows), max(map(len, rows))))
        return continue_prompts(trunk, rows, **settings)

    monkeypatch.setattr("offramp.llm.data.continue_prompts", recording)
    monkeypatch.setattr("offramp.llm.data._BATCH_TOKENS", 40 * (7 + 12))
    prepare_corpus(trunk, PLAN, tmp_path / "whole", prompts=prompts)
    whole = sizes.copy()
    assert whole[0] == (40, 7)
    assert max(longest for _, longest in whole) > 20
    assert all(rows * (longest + 12) <= 40 * (7 + 12) for rows, longest in whole)

    def interrupt(_stage, done, _total):
        if done > 900:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(trunk, PLAN, tmp_path / "cut", prompts=prompts, progress=interrupt)
    prepare_corpus(trunk, PLAN, tmp_path / "cut", prompts=prompts)
    assert sizes == [*whole, *whole]
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


@pytest.mark.parametrize(("length", "rows"), [(400, 96), (4000, 12), (60_000, 1)])
def test_a_batch_is_of_some_fifty_thousand_tokens_at_most(trunk, tmp_path, monkeypatch, length, rows):
    def asked(_trunk, prompts, **_):
        assert len(prompts) == rows
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.llm.data.continue_prompts", asked)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(trunk, CorpusPlan((2,), 100_000), tmp_path, prompts=[torch.full((length,), 7)])


def test_an_interrupted_reading_of_own_text_is_completed(trunk, texts, tmp_path):
    sequences = as_sequences(texts * 4, None, max_positions=160)
    plan = CorpusPlan(layers=(2,), tokens=100_000)
    whole = prepare_corpus(trunk, plan, tmp_path / "whole", sequences=sequences)
    assert whole.rows == 4 * 60 * 29

    def interrupt(_stage, done, _total):
        if done > 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(trunk, plan, tmp_path / "cut", sequences=sequences, progress=interrupt)
    assert prepare_corpus(trunk, plan, tmp_path / "cut", sequences=sequences).rows == whole.rows
    assert shards(tmp_path / "cut") == shards(tmp_path / "whole")


def test_a_damaged_shard_is_named(trunk, starts, tmp_path):
    prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
    for part in ("text", "layer-4"):
        victim = tmp_path / f"shard-00001.{part}.safetensors"
        kept = victim.read_bytes()
        data = bytearray(kept)
        data[-100] ^= 1
        victim.write_bytes(bytes(data))
        with pytest.raises(StorageError, match=f"shard-00001.{part}.safetensors is damaged"):
            prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
        victim.write_bytes(kept)


def test_a_corpus_of_something_else_is_refused(trunk, starts, tmp_path):
    prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
    for plan, prompts, what in (
        (CorpusPlan((2, 4), 2500, 12, 8), starts, "seed"),
        (CorpusPlan((2, 4), 2500, 13, 9), starts, "max_new_tokens"),
        (PLAN, starts[1:], "text"),
        # What another tokenizer makes of the same words.
        (PLAN, [prompt.flip(0) for prompt in starts], "text"),
    ):
        with pytest.raises(StorageError, match=f"another {what}"):
            prepare_corpus(trunk, plan, tmp_path, prompts=prompts)
    with pytest.raises(StorageError, match="another end"):
        prepare_corpus(trunk, PLAN, tmp_path, prompts=starts, end_tokens=[7])
    changed = type(trunk)(trunk.model)
    first = changed.model.model.layers[0].mlp.up_proj.weight
    kept = first.clone()
    first.mul_(1.5)
    try:
        with pytest.raises(StorageError, match="another model"):
            prepare_corpus(changed, PLAN, tmp_path, prompts=starts)
    finally:
        first.copy_(kept)


def test_a_folder_with_other_files_is_left_alone(trunk, starts, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="other files"):
        prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("plan", [{"tokens": 0}, {"tokens": 5, "max_new_tokens": 0}, {"tokens": 2.5}])
def test_a_plan_for_nothing_is_refused(plan):
    with pytest.raises(InputError, match="whole number"):
        CorpusPlan(layers=(2,), **plan)


def test_sequences_are_read_from_what_users_have():
    tensor = torch.arange(6).reshape(2, 3)
    assert [item.tokens.tolist() for item in as_sequences(tensor, None, max_positions=9)] == [
        [0, 1, 2],
        [3, 4, 5],
    ]
    given = TokenSequence(torch.tensor([4, 5, 6], dtype=torch.int32), 2)
    [item] = as_sequences([given], None, max_positions=9)
    assert item.tokens.dtype == torch.int64
    assert item.generated == 1
    with pytest.raises(InputError, match="at least one token of prompt"):
        as_sequences([TokenSequence(torch.tensor([4, 5]), 2)], None, max_positions=9)
    with pytest.raises(InputError, match="not a list"):
        as_sequences("text", None, max_positions=9)


def test_of_too_much_own_text_sequences_of_every_length_are_drawn(trunk, tmp_path):
    generator = torch.Generator().manual_seed(2)
    lengths = torch.randint(2, 150, (120,), generator=generator).tolist()
    sequences = as_sequences([torch.full((length,), 7) for length in lengths], None, max_positions=160)
    corpus = prepare_corpus(trunk, CorpusPlan((2,), 2000), tmp_path / "a", sequences=sequences)
    assert 2000 <= corpus.rows < 2000 + 150
    assert corpus.lengths.float().mean() == pytest.approx(sum(lengths) / len(lengths), rel=0.35)
    again = prepare_corpus(trunk, CorpusPlan((2,), 2000), tmp_path / "b", sequences=sequences)
    assert again.rows == corpus.rows
    other = prepare_corpus(trunk, CorpusPlan((2,), 2000, seed=1), tmp_path / "c", sequences=sequences)
    assert shards(tmp_path / "a") == shards(tmp_path / "b") != shards(tmp_path / "c")
    assert 2000 <= other.rows < 2000 + 150


def test_prompts_are_continued_greedily_and_come_round_warmer(trunk, starts, tmp_path, monkeypatch):
    asked, seeds = [], []
    original = continue_prompts

    def recording(trunk, prompts, *, temperatures, generator, **kwargs):
        asked.extend(zip([tuple(prompt.tolist()) for prompt in prompts], temperatures, strict=True))
        seeds.append(generator.initial_seed())
        return original(trunk, prompts, temperatures=temperatures, generator=generator, **kwargs)

    monkeypatch.setattr("offramp.llm.data.continue_prompts", recording)
    corpus = prepare_corpus(trunk, CorpusPlan((2,), 9 * 32 * 5, 5), tmp_path, prompts=starts[:32])
    assert len(asked) == 9 * 32
    assert asked[:32] == [(tuple(prompt.tolist()), 0.0) for prompt in starts[:32]]
    assert [heat for _, heat in asked[::32]] == [0.0, *[0.5, 0.8, 1.0] * 3][:9]
    assert len(set(seeds)) == len(seeds) == 3
    # However often a prompt's turn comes, its text is new.
    for number in range(32):
        found = {tuple(corpus.sequence(number + 32 * turn).tokens.tolist()) for turn in range(9)}
        assert len(found) >= 8


@pytest.mark.parametrize("name", ["corpus.json", "shard-00000.json"])
@pytest.mark.parametrize("text", ["[]", "3", "{", "\udcff"])
def test_a_damaged_note_gets_a_sentence(trunk, starts, tmp_path, name, text):
    plan = CorpusPlan((2,), 20, 5)
    prepare_corpus(trunk, plan, tmp_path, prompts=starts)
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(StorageError, match=rf"{name} .*damaged"):
        prepare_corpus(trunk, plan, tmp_path, prompts=starts)


def test_a_note_of_other_files_or_none_is_named(trunk, starts, tmp_path):
    """Shards after one whose note is gone would be written over."""
    prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
    kept = shards(tmp_path)
    note = tmp_path / "shard-00001.json"
    whole = note.read_text()
    for other in (whole.replace("layer-2", "layer-x"), whole.replace('"text"', '"layer-3"'), None):
        note.unlink()
        if other is not None:
            note.write_text(other)
        with pytest.raises(StorageError, match=r"shard-00001\.json is damaged"):
            prepare_corpus(trunk, PLAN, tmp_path, prompts=starts)
        note.write_text(whole)
    assert shards(tmp_path) == kept
    note.unlink()
    # What is read without it needs it not.
    assert prepare_corpus(trunk, CorpusPlan((2, 4), 500, 12, 9), tmp_path, prompts=starts).rows >= 500


def test_an_interrupted_write_leaves_nothing_half_written(trunk, starts, tmp_path, monkeypatch):
    def interrupt(*_args):
        raise KeyboardInterrupt

    plan = CorpusPlan((2,), 20, 5)
    for name in ("offramp.llm.files.os.replace", "offramp.llm.data.sha256_of"):
        monkeypatch.setattr(name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(trunk, plan, tmp_path, prompts=starts)
        monkeypatch.undo()
        assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]
        prepare_corpus(trunk, CorpusPlan((2,), 20, 5), tmp_path, prompts=starts)
        for path in tmp_path.iterdir():
            path.unlink()


def test_a_first_run_that_was_killed_can_be_begun_again(trunk, starts, tmp_path):
    (tmp_path / "corpus.json.tmp").write_text("{")
    assert prepare_corpus(trunk, CorpusPlan((2,), 20, 5), tmp_path, prompts=starts).rows >= 20


@pytest.mark.parametrize(
    ("sequences", "words"),
    [
        ({"input_ids": [[1, 2]]}, "not a list"),
        ([None], r"sequences\[0\] is not one row"),
        ([["a", "b"]], r"sequences\[0\] is not one row"),
        ([[1, [2, 3]]], r"sequences\[0\] is not one row"),
        ([TokenSequence(torch.ones(2, 2, dtype=torch.int64))], r"sequences\[0\] is not one row"),
    ],
)
def test_what_is_no_text_gets_a_sentence(sequences, words):
    with pytest.raises(InputError, match=words):
        as_sequences(sequences, None, max_positions=9)


def test_a_single_text_is_not_taken_for_a_list_of_letters():
    with pytest.raises(InputError, match="prompts is a single text"):
        encode_prompts("Tell me.", object(), max_positions=9)


def test_a_full_context_window_is_not_too_long():
    (full,) = as_sequences([list(range(20))], None, max_positions=20)
    assert len(full.tokens) == 20
    with pytest.raises(InputError, match=r"sequences\[0\] needs 21 tokens.*window holds 20"):
        as_sequences([list(range(21))], None, max_positions=20)
