"""Made languages: one meaning, many ways to say it; instructions with their answers."""

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.tasks import in_seqio
from espalier.data.tokenizers import vocabularies
from espalier.launch.papers.aya23 import toy_languages as toy


def test_languages_of_a_family_share_half_of_their_words_and_no_language_has_a_word_twice():
    languages = [toy.Language(number) for number in range(toy.LANGUAGES)]
    assert all(len(set(one.words)) == toy.CONCEPTS for one in languages)
    same = np.array([[np.sum(a.words == b.words) for b in languages] for a in languages])
    for i in range(toy.LANGUAGES):
        for j in range(i):
            if i // toy.FAMILY == j // toy.FAMILY:
                assert 30 <= same[i, j] <= 33
            else:
                assert same[i, j] <= 3


def test_a_sentence_says_the_same_in_every_language():
    meaning = np.array([3, 5, 7, 11, 2])
    for number in range(toy.LANGUAGES):
        language = toy.Language(number)
        said = language.say(meaning)
        assert len(said) == language.sentence_length == 5 + len(language.marks)
        noun, first, verb, object, second = (
            language.words[x]
            for x in (3, toy.NOUNS + 5, toy.NOUNS + toy.ADJECTIVES + 7, 11, toy.NOUNS + 2)
        )
        assert {noun, first, verb, object, second, *language.marks} == set(said.tolist())
        places = {"s": said.tolist().index(noun), "v": said.tolist().index(verb)}
        places["o"] = said.tolist().index(object)
        assert "".join(sorted(places, key=places.get)) == language.order
        assert (said.tolist().index(first) < places["s"]) == language.adjective_first


def test_documents_are_their_seeds_and_begin_with_their_language():
    source = toy.ToySource("toy_2", 20, 0, 2, 64)
    texts = source.texts("train")
    assert texts == toy.ToySource("toy_2", 20, 0, 2, 64).texts("train")
    assert texts != source.texts("validation")
    assert {len(text) for text in texts} == {64}
    tag = toy.SYMBOLS[toy.symbol("language", 2)]
    assert {text[0] for text in texts} == {tag}
    # Half of the documents say each sentence again, in one of the common languages; of the other languages none does.
    tags = [toy.SYMBOLS[toy.symbol("language", i)] for i in range(toy.COMMON)]
    said = [[letter for letter in text if letter in tags] for text in texts]
    assert any(set(one) == {tag} for one in said) and any(len(set(one)) == 2 for one in said)
    other = toy.ToySource("toy_9", 20, 0, 9, 64).texts("train")
    assert not any(set(tags) & set(text) for text in other)


def test_a_sentence_that_is_said_again_says_the_same():
    meaning = toy.meanings((1, 1), np.random.default_rng(0))
    both = np.concatenate([toy._tagged(number, meaning)[0, 0] for number in (0, 3)])
    first, second = toy.Language(0).say(meaning[0, 0]), toy.Language(3).say(meaning[0, 0])
    stop = toy.symbol("sign", "stop")
    tags = [toy.symbol("language", number) for number in (0, 3)]
    assert both.tolist() == [tags[0], *first, stop, tags[1], *second, stop]


def test_an_answer_says_the_sentence_in_the_language_that_is_asked_for():
    (source,) = [one for one in toy.instructions(6, 0) if one.name == "toy_translate_1_2"]
    prompt, answer = source.requests("train")
    spoken, wanted = toy.Language(1), toy.Language(2)
    back = {word: concept for concept, word in enumerate(spoken.words)}
    for asked, told in zip(prompt, answer, strict=True):
        concepts = {back[x] for x in asked if x in back}
        assert {wanted.words[x] for x in concepts} == set(told[:-1]) - set(wanted.marks)
        assert told[-1] == toy.symbol("sign", "end")
    (unturned,) = [one for one in toy.instructions(6, 0, turns=False) if one.languages == (1, 2)]
    plain, same = unturned.requests("train")
    assert unturned.name == "toy_plain_translate_1_2"
    assert (same == answer).all() and plain.shape[1] == prompt.shape[1] - 5
    assert (plain[:, 3:] == prompt[:, 5:-3]).all()
    example = source.examples("train")
    assert (example["loss_weights"].sum(axis=1) == answer.shape[1]).all()
    assert (example["targets"][:, -answer.shape[1] :] - 3 == answer).all()


def test_tasks_and_mixtures_are_registered_for_the_right_vocabulary():
    seqio = in_seqio()

    toy.register(vocabulary=vocabularies.characters(symbols=toy.symbols()), documents=4, requests=2)
    try:
        mixture = seqio.MixtureRegistry.get("toy_mix_4")
        assert {task.name for task in mixture.tasks} == {f"toy_{i}" for i in range(4)}
        asked = seqio.MixtureRegistry.get("toy_instructions")
        rates = {task.name: asked.get_rate(task) for task in asked.tasks}
        assert len(rates) == 4 + 12
        assert rates["toy_copy_0"] / rates["toy_translate_0_1"] == pytest.approx(3)
        assert len(toy.instruction_tasks()) == 32
        assert set(rates) < set(toy.instruction_tasks()) <= set(seqio.TaskRegistry.names())
    finally:
        tasks.clear()
    with pytest.raises(ValueError, match="must have the symbols of"):
        toy.register(vocabulary=vocabularies.byte())
