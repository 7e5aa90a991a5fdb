"""Flags from the settings of dataclasses and functions."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Interval

from espalier.common.ranges import Count, Size
from espalier.launch.config import setting_flags


@dataclasses.dataclass(frozen=True)
class Cut:
    """How to cut.

    Attributes:
      width: of the blade,
        in 100% steel.
      angle, depth: both in degrees.
      tool: by name.
      dry: without water.
      cooled: with water.

    Raises:
      ValueError: never.
    """

    width: int
    angle: float = 30.0
    depth: float | None = None
    tool: Literal["saw", "knife"] | None = "saw"
    dry: bool = False
    cooled: bool = True


def saw(wood: str, *, width: int = 3, teeth: str | None = None) -> None:
    """Saws.

    Args:
      wood: its name.
      width: of the blade.
      teeth: in order.
    """


def parsed(*words, target=Cut, **options):
    parser = argparse.ArgumentParser(prog="cut")
    setting_flags.add(parser, target, **options)
    kind = target if callable(target) else type(target)
    return setting_flags.given(parser.parse_args(words), kind), parser.format_help()


def test_flags_have_the_types_defaults_and_texts_of_the_fields():
    values, page = parsed("--width=7", "--angle=2.5", "--depth=3", "--tool=knife", "--dry")
    assert values == {"width": 7, "angle": 2.5, "depth": 3.0, "tool": "knife", "dry": True}
    page = " ".join(page.split())
    assert "--width N of the blade, in 100% steel" in page
    assert "--angle X both in degrees (default 30.0) --depth X both in degrees --tool" in page
    assert "{saw,knife}" in page and "(default saw)" in page
    assert "--no-cooled" in page and "--no-dry" not in page


def test_what_is_absent_is_left_to_the_class():
    values, _ = parsed("--width=7", "--no-cooled")
    assert Cut(**values) == Cut(width=7, cooled=False)


@pytest.mark.parametrize("words", [[], ["--width=x"], ["--width=1", "--tool=axe"]])
def test_wrong_and_missing_values_are_errors_of_the_command_line(words):
    with pytest.raises(SystemExit):
        parsed(*words)


def test_an_instance_brings_its_own_defaults_and_names_choose_and_order():
    values, page = parsed("--angle=1", target=Cut(width=2, angle=9.0), names=("angle", "width"))
    assert values == {"angle": 1.0}
    assert "(default 9.0)" in page and page.index("--angle X  ") < page.index("--width N  ")
    assert "--tool" not in page
    assert parsed(optional=True)[0] == {}


def test_functions_have_settings_too():
    values, page = parsed("--wood=oak", "--teeth=ab", target=saw)
    assert values == {"wood": "oak", "teeth": "ab"}
    assert "of the blade (default 3)" in page
    teeth = setting_flags.settings_of(saw)["teeth"]
    assert (teeth.kind, teeth.optional, teeth.default) == (str, True, None)
    assert setting_flags.settings_of(saw)["wood"].default is setting_flags.REQUIRED


def test_a_setting_without_a_text_or_of_another_type_is_refused():
    def untold(*, width: int = 3):
        """Does a thing."""

    def listed(*, widths: list[int] = ()):
        """Does a thing.

        Args:
          widths: of blades.
        """

    for target in (untold, listed):
        with pytest.raises(TypeError, match=f"{target.__name__}.width"):
            setting_flags.settings_of(target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FineCut(Cut):
    """A cut with files.

    Attributes:
      plan: drawing.
      marks: where to cut.
      tools: in order; repeatable.
      sides: numbers.
      faces: by name.
      passes: number.
    """

    plan: setting_flags.File | None = None
    marks: setting_flags.Names = ("a", "b")
    tools: Sequence[Annotated[str, "TOOL"]] = ()
    sides: Annotated[Sequence[int], setting_flags.MANY] = (1, 2)
    faces: Annotated[Sequence[Literal["top", "end"]], setting_flags.MANY] = ()
    passes: Annotated[int, Interval(ge=1)] = 1


def test_annotations_say_what_a_value_is_called_and_bases_have_texts():
    words = ("--width=1", "--plan=p", "--marks=x,y", "--tools=saw", "--tools=knife", "--passes=2")
    words = (*words, "--sides", "3", "4", "--faces", "end", "top")
    values, page = parsed(*words, target=FineCut)
    page = " ".join(page.split())
    own = {"plan": "p", "marks": ("x", "y"), "tools": ["saw", "knife"], "passes": 2}
    own |= {"sides": [3, 4], "faces": ["end", "top"]}
    assert values == {"width": 1, **own}
    for text in ("--plan FILE", "--marks NAMES", "--tools TOOL", "--passes N", "--width N of the"):
        assert text in page
    assert "(default a,b)" in page and "(default ())" not in page
    assert "--sides N [N ...] numbers (default 1,2)" in page


def test_flags_are_filled_with_the_defaults_of_their_class():
    parser = argparse.ArgumentParser()
    parser.add_argument("--other", default=1)
    setting_flags.add(parser, Cut)
    flags = setting_flags.filled(parser.parse_args(["--width=7", "--no-cooled"]), Cut)
    assert vars(flags) == {**dataclasses.asdict(Cut(width=7, cooled=False)), "other": 1}


def mow(
    *, rows: Size | None = None, first: Count = 0, blade: Annotated[float, Ge(2)] = 2.5
) -> None:
    """Mows.

    Args:
      rows: number of rows.
      first: of the rows.
      blade: its width.
    """


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--rows=0", r"^--rows=0 must be at least 1\.$"),
        ("--first=-1", r"^--first=-1 must be at least 0\.$"),
        ("--blade=1.5", r"^--blade=1\.5 must be at least 2\.$"),
    ],
)
def test_a_number_below_the_least_of_its_type_is_refused(word, message):
    values, _ = parsed("--rows=1", "--first=0", "--blade=2", target=mow)
    assert values == {"rows": 1, "first": 0, "blade": 2.0}
    with pytest.raises(ValueError, match=message):
        parsed(word, target=mow)
