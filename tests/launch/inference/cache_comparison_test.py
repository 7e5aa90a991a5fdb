"""The sentence on how many continuations equal those of the full cache."""

from espalier.launch.inference.cache_comparison import Agreement


def test_the_sentence_says_which_continuations_differ():
    agreement = Agreement()
    assert agreement.add([1, 2], [1, 3]) == 1
    assert str(agreement) == (
        "0 of 1 continuations equal the full cache's; all differ after 1.0 tokens on average"
    )
    agreement.add([1], [1])
    assert str(agreement).startswith(
        "1 of 2 continuations equal the full cache's; the others differ"
    )
