"""Texts in many scripts, code, digits, white space and special tokens; conversations."""

import itertools
import random

SENTENCES = (
    "The quick brown fox jumps over the lazy dog's back; it's 3.14159 and it'll be 2024-11-25.",
    "def f(x: int) -> str:\n    return f'{x:08.3f}'  # ünïcode\n\n\tif x != 0x1F:\n\t\tpass\r\n",
    "كل الناس يولدون أحراراً متساوين في الكرامة والحقوق ١٢٣",
    "人人生而自由,在尊严和权利上一律平等。",
    "Všichni lidé rodí se svobodní a sobě rovní.",
    "Alle mensen worden vrij en gelijk in waardigheid geboren.",
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι.",
    "כל בני האדם נולדו בני חורין ושווים בערכם",
    "सभी मनुष्यों को गौरव और अधिकारों के मामले में १२३",
    "すべての人間は、生まれながらにして自由である。",
    "모든 인간은 태어날 때부터 자유로우며",
    "تمام افراد بشر آزاد به دنیا می‌آیند ۱۲۳",
    "Все люди рождаются свободными и равными.",
    "Tất cả mọi người sinh ra đều được tự do và bình đẳng.",
    "Усі люди народжуються вільними і рівними.",
    "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar.",
    "မြန်မာ ไทย ქართული Հայերեն አማርኛ 🙂👩‍🔬🇫🇷 ½ Ⅷ ² ①",
)
PIECES = (
    *(" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u200b", "\u3000", "\x00", "\x7f"),
    *("a", "The", "word", "don't", "WE'LL", "1", "42", "1234567", "3.5e-10", "٣", "e\u0301", "ß"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start", "<repo_name>", "<0x0A>", "</s>"),
    *("{", "}", "==", "!!!", "...", "#", "'s", "日本", "한", "🙂", "نص", "नम"),
)
CONVERSATIONS = (
    [{"role": "user", "content": "Hi, what is 12 * 34?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "b\n"},
        {"role": "user", "content": "<|im_end|> 2024"},
    ],
)


def texts() -> list[str]:
    """400 texts, always the same."""
    rng = random.Random(0)
    mixed = ["".join(rng.choices(PIECES, k=rng.randint(1, 14))) for _ in range(360)]
    pairs = itertools.islice(itertools.combinations(SENTENCES, 2), 22)
    return ["", *SENTENCES, *(f"{a}  {b}" for a, b in pairs), *mixed]
