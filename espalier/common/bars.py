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
        if self.total and (done := self.n - self._first):
            seconds = (time.monotonic() - self._began) * (self.total - self.n) / done
            text += f" (about {duration(seconds)} left)"
        return text
