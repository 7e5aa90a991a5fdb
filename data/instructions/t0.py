"""The datasets of T0 (arXiv 2110.08207), by the names of promptsource: what it is trained on, and what is held out.

MoV and MoLORA (arXiv 2309.05444) are tuned and evaluated on the same sets.
"""

TRAIN = {
    "multiple_choice_qa": (
        "cos_e/v1.11",
        "cosmos_qa",
        "dream",
        "qasc",
        "quail",
        "quarel",
        "quartz",
        "sciq",
        "social_i_qa",
        "wiki_hop/original",
        "wiqa",
    ),
    "extractive_qa": (
        "adversarial_qa/dbert",
        "adversarial_qa/dbidaf",
        "adversarial_qa/droberta",
        "duorc/ParaphraseRC",
        "duorc/SelfRC",
        "quoref",
        "ropes",
    ),
    "closed_book_qa": ("kilt_tasks/hotpotqa", "wiki_qa"),
    "structure_to_text": ("common_gen", "wiki_bio"),
    "sentiment": (
        "amazon_polarity",
        "app_reviews",
        "imdb",
        "rotten_tomatoes",
        "yelp_review_full",
    ),
    "summarization": ("cnn_dailymail/3.0.0", "gigaword", "multi_news", "samsum", "xsum"),
    "topic_classification": ("ag_news", "dbpedia_14", "trec"),
    "paraphrase_identification": ("glue/mrpc", "glue/qqp", "paws/labeled_final"),
}

HELD_OUT = {
    "anli": ("anli/r1", "anli/r2", "anli/r3"),
    "cb": ("super_glue/cb",),
    "rte": ("super_glue/rte",),
    "wsc": ("super_glue/wsc.fixed",),
    "wic": ("super_glue/wic",),
    "copa": ("super_glue/copa",),
    "winogrande": ("winogrande/winogrande_xl",),
    "hellaswag": ("hellaswag",),
}


def train() -> dict[str, tuple[str, ...]]:
    """Returns category -> its sets, for `register_instructions`."""
    return dict(TRAIN)


def held_out() -> dict[str, tuple[str, ...]]:
    """Returns evaluated task -> its sets; no category of `train` has such tasks."""
    return dict(HELD_OUT)
