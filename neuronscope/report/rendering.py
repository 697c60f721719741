"""Give every report the same output methods: printing, HTML, JSON, markdown, a table of pandas and a figure.

A report names the modules of its writers and imports them only when it is shown, so that reports do not depend on
writers.
"""

from __future__ import annotations

import html
import importlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from neuronscope.errors import UsageError, requiring
from neuronscope.output import write_if_named

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["LayersByName", "Renderable", "Shown"]


class _HasName(Protocol):  # a layer of any report
    @property
    def name(self) -> str: ...


LayerT = TypeVar("LayerT", bound=_HasName)


class LayersByName(Generic[LayerT]):
    """Base class of what has layers, each of which is found by its name."""

    layers: tuple[LayerT, ...]

    def __getitem__(self, name: str) -> LayerT:
        """Return the layer with this name; without one, raise KeyError."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)


class Shown:
    """Base class of what is shown as text, JSON and a page. A subclass names the module of each of its writers.

    Attributes:
        WRITERS: Names of the writers' modules, by format. Each has a function ``render``; ``table`` has functions that
            return columns, and ``figure`` has a function ``draw``.
    """

    WRITERS: ClassVar[Mapping[str, str]]

    def __repr__(self) -> str:
        """Return one line; :meth:`__str__` has the report."""
        return f"<{type(self).__name__} {self._in_short()}; print(…) shows it>"

    def __str__(self) -> str:
        """Return the report as a table for a terminal."""
        return self.to_text()

    def to_text(self, top: int = 20) -> str:
        """Return the report as text for a terminal.

        Args:
            top: Most layers that get a row of the table: of more, the worst.
        """
        text: str = self._writer("terminal").render(self, top)
        return text

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as one line of strict JSON (RFC 8259, ASCII), and write it to ``path`` if given.

        Keys are sorted, so that equal reports give the same bytes. ``schema_version`` names the schema.

        Raises:
            OSError: The file cannot be written; an existing file is then unchanged.
        """
        text = json.dumps(self.to_dict(), allow_nan=False, sort_keys=True, separators=(",", ":")) + "\n"
        return write_if_named(text, path)

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the report as one HTML page without external resources, and write it to ``path`` if given.

        Raises:
            OSError: The file cannot be written; an existing file is then unchanged.
        """
        return write_if_named(self._render("html"), path)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data."""
        raise NotImplementedError

    def _in_short(self) -> str:
        """Return what the report is on and how many neurons are dead, in one line."""
        raise NotImplementedError

    def _render(self, writer: str) -> str:
        text: str = self._writer(writer).render(self)
        return text

    def _writer(self, name: str) -> Any:
        state = random.getstate()  # the import of rich draws a number, and a training may depend on the next ones
        try:
            return importlib.import_module(self.WRITERS[name])
        finally:
            random.setstate(state)


class Renderable(Shown):
    """Base class of reports."""

    def _repr_html_(self) -> str:
        """Return the report's page for a notebook, in a frame whose scripts and styles cannot reach the notebook."""
        page = html.escape(self.to_html())
        style = "width: 100%; height: 40rem; border: 1px solid #8888"
        rights = 'sandbox="allow-scripts" allow="clipboard-write"'
        return f'<iframe title="Neuronscope report" {rights} style="{style}" srcdoc="{page}"></iframe>'

    def to_markdown(self, path: str | Path | None = None) -> str:
        """Return the report as markdown, and write it to ``path`` if given; see :meth:`to_html`."""
        return write_if_named(self._render("markdown"), path)

    def to_pandas(self, rows: str = "layer") -> Any:
        """Return the report as a ``pandas.DataFrame``; pandas is optional, and only needed here.

        Args:
            rows: ``layer`` for a row a layer, with its counts, or ``neuron`` for a row a neuron, with its label.

        Raises:
            MissingExtraError: Pandas is not installed.
            UsageError: ``rows`` is neither.
        """
        if rows not in ("layer", "neuron"):
            raise UsageError(f"Expected argument `rows` to be 'layer' or 'neuron', but got {rows!r}.")
        with requiring("pandas", "`to_pandas()`", "pandas"):
            import pandas
        return pandas.DataFrame(getattr(self._writer("table"), f"{rows}_columns")(self))

    def plot(self, figure: Any = None) -> Figure:
        """Draw dead neurons over the steps, and the labels of the worst layers, with matplotlib, which is optional.

        The fonts, sizes and backgrounds are those of matplotlib's current style, and everything in the figure can be
        changed afterwards: ``report.plot().axes[0].set_ylim(0, 100)``.

        Args:
            figure: A ``Figure`` or ``SubFigure`` to draw into, such as ``plt.figure()``, so that ``plt.show()`` shows
                it; a new one of its own by default.

        Returns:
            The figure.

        Raises:
            MissingExtraError: Matplotlib is not installed.
        """
        drawn: Figure = self._writer("figure").draw(self, figure)
        return drawn
