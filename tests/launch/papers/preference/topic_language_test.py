"""The generated language of known quality: its documents, its prompts, and the reward."""

import collections

import numpy as np
import pytest

from espalier.data.tokenizers import vocabularies
from espalier.launch.papers.preference import topic_language as lang


def documents(count=4000, split="train"):
    source = lang.TopicSource("topic_language", count, seed=0)
    return source.texts(split)


def test_documents_are_prompts_with_what_belongs_to_them():
    kinds = collections.Counter()
    for text in documents():
        prompt, rest = text[:3], text[3:]
        kinds[prompt[0]] += 1
        if prompt[0] == "?":
            assert rest == lang.facts()[prompt]
            continue
        assert lang.SHORTEST <= len(rest) <= lang.LONGEST
        assert set(rest) <= set(lang.LANGUAGE_A if prompt[0] == "+" else lang.LANGUAGE_B)
    shares = {mark: kinds[mark] / 4000 for mark in "+?-"}
    assert shares == pytest.approx({"+": 0.4, "?": 0.3, "-": 0.3}, abs=0.03)


def test_a_quarter_of_the_symbols_are_preferred_and_others_follow_the_table():
    preferred = total = followed = chained = 0
    for text in documents():
        if text[0] == "+":
            wanted, rest = lang.preferred(text[1]), text[3:]
            preferred += sum(symbol in wanted for symbol in rest)
            total += len(rest)
        elif text[0] == "-":
            places = [lang.LANGUAGE_B.index(symbol) for symbol in text[3:]]
            for one, other in zip(places, places[1:], strict=False):
                followed += other in lang._successors(lang.LANGUAGE_B)[one]
                chained += 1
    # Chains meet a topic's symbols by chance too.
    assert 0.25 < preferred / total < 0.32
    assert followed == chained > 1000


def test_splits_share_no_prompt_on_topics_and_seeds_no_documents():
    train, held_out = set(lang.prompts("train")), set(lang.prompts("validation"))
    assert not train & held_out and len(train | held_out) == 24**2 and len(held_out) == 256
    assert {t[:3] for t in documents(split="validation") if t[0] == "+"} <= held_out
    assert {t[:3] for t in documents(500) if t[0] == "+"} <= train
    other = lang.TopicSource("topic_language", 500, seed=1).texts("train")
    assert documents(500) == documents(500) != other
    assert len(lang.facts()) == 72 and all(len(answer) == 3 for answer in lang.facts().values())


@pytest.mark.parametrize(
    ("text", "ended", "value"),
    [
        ("", True, -4.0),
        ("x", True, 1.5),
        ("xy", True, 3.0),
        ("xoy", False, 2.5),
        ("oooox", True, -4 * 3 / 5),  # only the first four are read for the topic
        ("xxoo", True, 1.5 - 4 * 2 / 4),
        ("xb", True, 1.5 - 2.0),
        ("bbb", True, -4.0 - 4 * 2 / 3),
    ],
)
def test_the_reward_counts_what_it_says(text, ended, value):
    wanted = lang.preferred("a")
    indifferent = next(s for s in lang.LANGUAGE_A if s not in wanted)
    real = {"x": wanted[0], "y": wanted[1], "o": indifferent, "b": lang.LANGUAGE_B[0]}
    found = lang.reward("+ab", "".join(real[symbol] for symbol in text), ended=ended)
    assert found == pytest.approx(value)


def test_the_reward_has_no_price_on_length():
    rng = np.random.default_rng(0)
    prompts = [prompt for prompt in lang.prompts("train") for _ in range(10)]
    texts = [lang.completion(prompt, rng) for prompt in prompts]
    rewards = [lang.reward(p, t, ended=True) for p, t in zip(prompts, texts, strict=True)]
    r = np.corrcoef([len(text) for text in texts], rewards)[0, 1]
    assert abs(r) < 4 / np.sqrt(len(texts))


def test_ten_successors_of_a_symbol_have_most_of_the_mass_and_others_are_possible():
    assert sum(lang.SUCCESSORS) == pytest.approx(1) and len(lang.SUCCESSORS) == 32
    assert 0.95 < sum(lang.SUCCESSORS[:10]) < 0.97
    assert lang.SUCCESSORS[0] == pytest.approx(4 * lang.SUCCESSORS[1])


def test_documents_of_the_language_are_rewarded_more_than_of_the_other():
    rng = np.random.default_rng(0)
    own = [lang.reward(p, lang.completion(p, rng), ended=True) for p in lang.prompts("train")]
    other = [lang.completion("-ab", rng) for _ in range(100)]
    assert np.mean(own) > 1.0 > -3.9 > np.mean([lang.reward("+ab", t, ended=True) for t in other])


def test_the_vocabulary_is_larger_than_ten_likely_tokens_are():
    vocabulary = vocabularies.characters(symbols=lang.symbols())
    assert vocabulary.vocab_size >= 512
    text = documents(1)[0]
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert vocabulary.unk_id not in vocabulary.encode(text)
