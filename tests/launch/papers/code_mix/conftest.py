"""Self-written rows of every evaluation set, in the files and columns of the public ones."""

import json

import pyarrow
import pyarrow.parquet
import pytest

BOOLQ = [
    {"passage": "Vines climb.", "question": "do vines climb", "label": 1},
    {"passage": "Stones lie.", "question": "do stones climb?", "label": 0},
]
PIQA = [
    {"goal": "Tie a shoot.", "sol1": "Use soft twine.", "sol2": "Use a hot nail.", "label": 0},
    {"goal": "Dry a towel.", "sol1": "Fold it wet.", "sol2": "Hang it up.", "label": 1},
]
SCIQ = [
    {
        "support": " Leaves turn light into sugar.",
        "question": "What do leaves make?",
        "correct_answer": "sugar",
        "distractor1": "salt",
        "distractor2": "iron",
        "distractor3": "glass",
    }
]
SIQA = [
    {
        "context": "Ada lent Ben her ladder.",
        "question": "What will Ben want to do next?",
        "answerA": "burn it",
        "answerB": "thank Ada",
        "answerC": "sleep",
        "label": "2",
    }
]
QUAC = [
    {
        "wikipedia_page_title": "Trellis",
        "section_title": "Use",
        "context": "A trellis holds vines. It is made of wood.",
        "questions": ["What does it hold?", "Who made it?"],
        "answers": {"texts": [["holds vines", "vines"], ["CANNOTANSWER"]]},
        "orig_answers": {"texts": ["vines", "CANNOTANSWER"]},
    }
]
CB = [{"premise": "It rained all day.", "hypothesis": "it was wet", "label": 0}]
COPA = [
    {
        "premise": "The vine fell.",
        "choice1": "The wire broke.",
        "choice2": "It was Monday.",
        "question": "cause",
        "label": 0,
    },
    {
        "premise": "It froze. ",
        "choice1": "The wine sang.",
        "choice2": "The buds died.",
        "question": "effect",
        "label": 1,
    },
]
STORIES = [
    {
        **{f"input_sentence_{n}": f"Sentence {n}." for n in (1, 2, 3, 4)},
        "sentence_quiz1": "It rained frogs.",
        "sentence_quiz2": "She went home.",
        "answer_right_ending": 2,
    }
]
HELLASWAG = [
    {
        "activity_label": "Pruning",
        "ctx_a": "A man holds shears [title] How to cut",
        "ctx_b": "he",
        "endings": ["cuts a [substeps] shoot.", "sings.", "flies.", "is a shoot."],
        "label": "0",
    }
]
WINOGRANDE = [
    {
        "sentence": "The vine outgrew the wall because the _ was low.",
        "option1": "vine",
        "option2": "wall",
        "answer": "2",
    }
]
ARC = [
    {
        "question": "Which is a plant?",
        "choices": {"text": ["vine", "nail", "rain"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "question": "Which is a metal?",
        "choices": {"text": ["oak", "tin"], "label": ["1", "2"]},
        "answerKey": "2",
    },
]
TRIVIA = [
    {"question": "What holds a vine?", "answer": {"value": "Trellis", "aliases": ["Lattice"]}}
]
NQ = [{"question": "who ties the shoots", "answer": ["the gardener", "gardeners"]}]

FILES = {
    "super_glue/boolq/validation-00000-of-00001.parquet": BOOLQ,
    "piqa/data/validation-00000-of-00001.parquet": PIQA,
    "sciq/data/test-00000-of-00001.parquet": SCIQ,
    "siqa/data/validation-00000-of-00001.parquet": SIQA,
    "quac/plain_text/validation/0000.parquet": QUAC,
    "super_glue/cb/validation-00000-of-00001.parquet": CB,
    "super_glue/copa/validation-00000-of-00001.parquet": COPA,
    "story_cloze/test.jsonl": STORIES,
    "hellaswag/data/validation-00000-of-00001.parquet": HELLASWAG,
    "winogrande/winogrande_xl/validation-00000-of-00001.parquet": WINOGRANDE,
    "ai2_arc/ARC-Easy/test-00000-of-00001.parquet": ARC,
    "trivia_qa/rc.nocontext/validation-00000-of-00001.parquet": TRIVIA,
    "nq_open/nq_open/validation-00000-of-00001.parquet": NQ,
}


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A folder with all sets."""
    folder = tmp_path_factory.mktemp("sets")
    for name, rows in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
