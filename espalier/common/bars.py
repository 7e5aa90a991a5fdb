"""Bars of progress on a terminal and in a notebook, which are stages elsewhere: they tell how far the work is."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

from espalier.common import stages
from espalier.common.stages import duration


class Bar(tqdm):
    """A bar of tqdm with its arguments; by default shown on a terminal only, and else a stage if it has a `desc`."""

    def __init__(self, iterable: Iterable[Any] | None = None, **settings: Any):
        super().__init__(iterable, **{"disable": None, **settings})
        self._began, self._first, self._settings = time.monotonic(), self.n, settings
        self._note = ""
        self._stage = contextlib.ExitStack()
        if self.disable and settings.get("desc"):
            self._stage.enter_context(stages.stage(self._text))

    def __iter__(self) -> Iterator[Any]:
        if not self.disable:
            yield from super().__iter__()
            return
        with self:
            for item in self.iterable:
                yield item
                self.n += 1

    def update(self, n: float | None = 1) -> bool | None:
        if self.disable:
            self.n += n or 0
        return super().update(n)

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Shows a text after the count."""
        self._note = s
        if not self.disable:
            super().set_postfix_str(s, refresh)

    def close(self) -> None:
        if stage := getattr(self, "_stage", None):  # a bar whose arguments were wrong has none
            stage.close()
        super().close()

    def _text(self) -> str:
        scaled = self._settings.get("unit_scale")
        now, total = (
            self.format_sizeof(x or 0) if scaled else f"{x or 0:,}" for x in (self.n, self.total)
        )
        text = f"{self._settings['desc']}: {now}"
        if self.total:
            text += f"/{total}"
        text += f" {self._settings.get('unit', '').strip()}".rstrip()
        done, seconds = self.n - self._first, time.monotonic() - self._began
        if self.total and done:
            text += f" (about {duration(seconds * (self.total - self.n) / done)} left)"
        elif scaled and done:
            text += f" ({self.format_sizeof(done / seconds)}/s)"
        return f"{text}, {self._note}" if self._note else text
