"""The evaluation suite of Aya Expanse by language, from the benchmarks of launch/evaluate/suites/multilingual.py.

Global-MMLU also has a group of the culturally sensitive questions and one of the agnostic ones. The report states neither
shots nor prompts of INCLUDE: five examples, as of Global-MMLU, and the languages of the models that it has. xCOMET of
translations is not measured, because it needs a model of its own.
"""

import functools

from espalier.launch.evaluate.suites import multilingual
from espalier.launch.evaluate.suites.multilingual import GLOBAL_MMLU, by_language, global_mmlu

_SENSITIVE = functools.partial(global_mmlu, kind="sensitive")
_AGNOSTIC = functools.partial(global_mmlu, kind="agnostic")

SUITE = multilingual.suite(
    "aya_expanse",
    {
        **multilingual.ranking_groups(),
        "global_mmlu": by_language("global_mmlu", global_mmlu, GLOBAL_MMLU),
        "global_mmlu_sensitive": by_language("global_mmlu_sensitive", _SENSITIVE, GLOBAL_MMLU),
        "global_mmlu_agnostic": by_language("global_mmlu_agnostic", _AGNOSTIC, GLOBAL_MMLU),
        "include": by_language("include", multilingual.include, multilingual.INCLUDE),
        "mgsm": by_language("mgsm", multilingual.mgsm, multilingual.MGSM),
        **multilingual.flores_groups("chrf"),
    },
)
