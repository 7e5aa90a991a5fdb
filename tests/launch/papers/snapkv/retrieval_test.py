"""The synthetic retrieval task: what a document is, what bears loss, and that it is a SeqIO task."""

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.stream import stream
from espalier.launch.papers.snapkv import retrieval

LINES = 5


def _rng(seed=0):
    return np.random.default_rng(seed)


def test_keys_of_a_document_are_distinct_and_every_id_is_of_its_kind():
    lines = retrieval.draw_lines(_rng(), 50, 48)
    assert all(len(set(keys)) == 48 for keys in lines.keys_EL.tolist())
    assert set(np.unique(lines.keys_EL)) == set(range(1, 65))
    for place in range(4):
        first = 65 + 16 * place
        assert set(np.unique(lines.values_ELA[..., place])) == set(range(first, first + 16))
    with pytest.raises(ValueError, match="lines = 65"):
        retrieval.draw_lines(_rng(), 1, 65)


def test_with_the_question_last_every_line_is_asked_once_and_values_alone_bear_loss():
    tokens_ET, weights_ET = retrieval.documents(_rng(), 8, LINES, "last")
    assert tokens_ET.shape == (8, 2 * 5 * LINES)
    for tokens, weights in zip(tokens_ET, weights_ET, strict=True):
        context, asked = tokens.reshape(2, LINES, 5)
        answer_of = {line[0]: line[1:].tolist() for line in context}
        assert sorted(asked[:, 0]) == sorted(answer_of)  # each once
        assert all(answer_of[line[0]] == line[1:].tolist() for line in asked)
        assert weights[: 5 * LINES].sum() == 0
        assert (weights[5 * LINES :].reshape(LINES, 5) == [0, 1, 1, 1, 1]).all()


def test_with_the_question_first_the_asked_line_is_found_by_its_asking_key():
    tokens_ET, weights_ET = retrieval.documents(_rng(), 8, LINES, "first")
    for tokens, weights in zip(tokens_ET, weights_ET, strict=True):
        context = tokens[1 : 1 + 5 * LINES].reshape(LINES, 5)
        (line,) = context[context[:, 0] == tokens[0] - retrieval.FIRST_ASKING + retrieval.FIRST_KEY]
        assert tokens[-5] == retrieval.MARK
        assert tokens[-4:].tolist() == line[1:].tolist()
        assert weights.tolist() == [0] * (len(tokens) - 4) + [1] * 4
    with pytest.raises(ValueError, match="'middle'"):
        retrieval.documents(_rng(), 1, LINES, "middle")


def test_prompts_end_before_the_answer_and_show_another_question_first():
    context = retrieval.draw_lines(_rng(), 20, LINES)
    found = retrieval.draw_prompts(_rng(1), context)
    assert found.tokens_ET.shape == (20, 7 + 5 * LINES)
    assert set(found.tokens_ET[:, 0]) == {0}
    for e in range(20):
        lines = found.tokens_ET[e, 1 : 1 + 5 * LINES].reshape(LINES, 5)
        shown, asked = found.tokens_ET[e, -6:-1], found.tokens_ET[e, -1]
        assert shown.tolist() in lines.tolist() and shown[0] != asked
        assert lines[found.line_E[e]].tolist() == [asked, *found.answers_EA[e]]
    first = retrieval.draw_prompts(_rng(1), context, "first", asked_E=found.line_E)
    assert (first.answers_EA == found.answers_EA).all()
    assert (first.tokens_ET[:, 1] - retrieval.FIRST_ASKING == found.tokens_ET[:, -1] - 1).all()


def test_the_tasks_stream_with_their_weights_and_always_the_same(tmp_path):
    def batch():
        tasks.clear()
        retrieval.register(lines=(3, 4), train_documents=64, seed=7)
        return stream.make_stream(
            mixture_or_task_name="retrieval",
            task_feature_lengths={"targets": 40},
            batch_size=8,
            cache_dir=tmp_path,
            phases=((0, {"retrieval_3": 0.5, "retrieval_first_4": 0.5}),),
        ).batch(0, 0, 8)

    first, second = batch(), batch()
    assert all((first[name] == second[name]).all() for name in first)
    weights, targets = first["decoder_loss_weights"], first["decoder_target_tokens"]
    values = (targets >= retrieval.FIRST_VALUE) & (targets < retrieval.MARK)
    assert 0 < weights.sum() < values.sum()  # values of the context bear none
    assert not weights[~values].any()


def test_a_change_of_the_seed_is_other_data():
    one, two = (retrieval.RetrievalSource("x", 16, seed, 4, "last") for seed in (0, 1))
    assert one.digest != two.digest
    assert one.num_input_examples("train") == 16
