"""Tasks, rates and errors of datasets on disk."""

import json

import pytest

from espalier.data.instructions import ranking, t0
from espalier.data.instructions.tasks import register_instructions
from espalier.data.tasks import in_seqio
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies

YAML = """
templates:
- {name: 'Is it?', jinja: '{{text}}? ||| {{answer_choices[label]}}', answer_choices: no ||| yes,
   metadata: {original_task: true}}
- {name: repeat, jinja: '{{text}} ||| {{text}}{{text}}'}
"""


@pytest.fixture
def register(tmp_path):
    """Writes sets of rows; registers some of them."""
    for name, count in {"small": 8, "group/large": 40, "group/other": 6}.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        rows = [json.dumps({"text": f"{n:02d}", "label": n % 2}) + "\n" for n in range(count)]
        (folder / "train-0.jsonl").write_text("".join(rows[::2]))
        (folder / "train-1.jsonl").write_text("".join(rows[1::2]))
        (folder / "validation.jsonl").write_text("".join(rows[:4]))
    for folder in ("small", "group"):
        (tmp_path / folder / "templates.yaml").write_text(YAML)

    def call(train=("small", "group/large"), held_out=("group/other",), **settings):
        register_instructions(
            **{
                "name": "instructions",
                "data_dir": str(tmp_path),
                "train": train if isinstance(train, dict) else {"all": list(train)},
                "held_out": {"task": list(held_out)} if held_out else None,
                "vocabulary": vocabularies.byte(),
                "form": "encoder_decoder",
                "cache_dir": tmp_path / "cache",
                **settings,
            }
        )

    return call


def test_tasks_mixture_and_ranking(register):
    register(cap=20)
    seqio = in_seqio()

    from espalier.data import tasks

    mixture = seqio.MixtureRegistry.get("instructions")
    rates = {task.name: mixture.get_rate(task) for task in mixture.tasks}
    # Targets: "no" and EOS, "yes" and EOS; four digits and EOS.
    assert rates == pytest.approx(
        {
            "small_is_it": 8 * 3.5,
            "small_repeat": 8 * 5,
            "group_large_is_it": 35,
            "group_large_repeat": 50,
        }
    )
    (held_out,) = [
        name
        for name, facts in tasks.registered("register_instructions").items()
        if "held_out" in facts
    ]
    assert held_out == "group_other_is_it_score_eval"
    task = seqio.TaskRegistry.get(held_out)
    assert task.splits == ("validation",)
    examples = list(task.get_dataset(None, "validation", shuffle=False).as_numpy_iterator())
    options = [ranking.option("", example, True) for example in examples]
    assert [each.is_right for each in options] == [True, False, False, True] * 2
    assert [each.tokens for each in options] == [3, 4] * 4
    scores = [0.0, -1.0] * 4  # always "no"
    assert ranking.accuracies(options, scores) == {"accuracy": 0.5, "accuracy_per_token": 0.5}


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"held_out": ["small"]},
            ValueError,
            r"'small' is in train\['all'\] and in held_out\['task'\]",
        ),
        ({"train": ["small", "small"]}, ValueError, r"'small' is in train\['all'\] and in train"),
        ({"train": {}, "held_out": ()}, ValueError, "name no set"),
        ({"train": {"all": "small"}}, ValueError, r"train\['all'\] is 'small'; write a list"),
        ({"train": ["none"]}, FileNotFoundError, "The set 'none' has no templates: neither "),
        ({"train": ["smal"]}, FileNotFoundError, r"exists \(did you mean 'small'\?\)\. Copy"),
        (
            {"train": ["group/none"]},
            FileNotFoundError,
            "The set 'group/none' has no rows: no file ",
        ),
        ({"form": "encoder"}, ValueError, "form is 'encoder'; it must be one of"),
        ({"add_bos": True}, ValueError, "add_bos=True, but "),
        ({"tfds_sets": {"smal": "x:1.0.0"}}, ValueError, "tfds_sets names the set 'smal', which"),
    ],
)
def test_what_cannot_be_registered_is_one_error(register, settings, error, message):
    with pytest.raises(error, match=message):
        register(**settings)


def test_a_file_of_rows_with_another_name_is_an_error(register, tmp_path):
    (tmp_path / "small" / "train2.jsonl").write_text("{}")
    with pytest.raises(
        DataError, match="train2.jsonl: the rows of a set are in files such as train.j"
    ):
        register()


def test_two_tasks_of_one_name_are_an_error(register, tmp_path):
    (tmp_path / "group" / "large").rename(tmp_path / "group_large")
    (tmp_path / "group_large" / "templates.yaml").write_text(YAML)
    (tmp_path / "group" / "large").symlink_to(tmp_path / "group_large")
    with pytest.raises(ValueError, match="'group/large' and 'group_large' would both have a task"):
        register(train=["group/large", "group_large"])


def test_a_set_without_evaluated_templates_is_an_error(register, tmp_path):
    (tmp_path / "group" / "templates.yaml").write_text(YAML.replace("true", "false"))
    with pytest.raises(
        DataError, match="no template has 'answer_choices' and 'original_task: true'"
    ):
        register(train=["small"])


def test_lists_of_t0():
    trained = [each for sets in t0.train().values() for each in sets]
    held_out = [each for sets in t0.held_out().values() for each in sets]
    assert (len(t0.TRAIN), len(t0.HELD_OUT)) == (8, 8)
    assert len(set(trained)) == len(trained) and not set(trained) & set(held_out)
