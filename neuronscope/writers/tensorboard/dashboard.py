"""Write reports to TensorBoard's own pages, at most once a step and never at an earlier step than before.

Works with the ``SummaryWriter`` of torch and that of tensorboardX, which take their protos from different packages.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from neuronscope.errors import UsageError, requiring, warn_user
from neuronscope.report.report import Report, SiteReport
from neuronscope.writers.report_bytes import to_bytes
from neuronscope.writers.tensorboard.diagnosis_text import diagnosis
from neuronscope.writers.tensorboard.event_file import (
    EncodedEvents,
    EventFile,
    folder_of,
    require_room,
    require_room_in_file,
)
from neuronscope.writers.tensorboard.scalars import scalars
from neuronscope.writers.tensorboard.tags import PLUGIN_NAME, TAB_TAG, card_name, metric, safe
from neuronscope.writers.wording import provisional_note, worst_first

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = ["MOST_HEATMAPS", "Dashboard", "EventWriter", "append", "tab_summary", "write"]

#: Heat maps written for one report.
MOST_HEATMAPS = 8


class EventWriter(Protocol):
    """The methods of a ``SummaryWriter`` that a report needs; those of torch and tensorboardX both have them."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one number.

        Args:
            tag: The tag.
            scalar_value: The number.
            global_step: The step.
        """

    def add_image(self, tag: str, img_tensor: Any, global_step: int, *, dataformats: str) -> Any:
        """Write one picture.

        Args:
            tag: The tag.
            img_tensor: The picture, uint8 ``(H, W, C)``.
            global_step: The step.
            dataformats: ``HWC``.
        """

    def add_text(self, tag: str, text_string: str, global_step: int) -> Any:
        """Write one text.

        Args:
            tag: The tag.
            text_string: Markdown.
            global_step: The step.
        """

    def flush(self) -> Any:
        """Wait until everything is written."""


def write(
    report: Report,
    writer: EventWriter,
    step: int,
    *,
    since: int | None = None,
    images: bool = True,
    text: bool = True,
    tab: bool = True,
    per_site: bool = True,
) -> None:
    """Write a report to TensorBoard at a step, all of it through ``writer``.

    Errors of the writer reach the caller. :class:`Dashboard` prevents a full disk from ending a training.

    Scalars and text take milliseconds. Pictures take about 40 ms each, most of it for PNG, and the report for the tab
    grows with the network: write them every few windows.

    Args:
        report: The report.
        writer: ``SummaryWriter`` of ``torch.utils.tensorboard`` or ``tensorboardX``.
        step: The trainer's step, for the x axis. Must never fall within a phase; :class:`Dashboard` ensures that.
        since: ``report.global_step`` of the report written before, so that deaths between the two are counted; see
            :func:`scalars`.
        images: Whether to draw the overview (``neuronscope/overview``) and heat maps (``neuronscope.neurons/<layer>``).
            A network of more than :data:`MOST_HEATMAPS` layers gets ``neuronscope.neurons/worst-1`` … ``worst-8``; each
            picture names its layer, so that the tags stay the same while the worst layers change. Sparse layers get a
            histogram of log10 firing densities too (``neuronscope.log10_density/<layer>``).
        text: Whether to write the diagnosis (``neuronscope/diagnosis``).
        tab: Whether to write the report for Neuronscope's own tab.
        per_site: Whether to write the scalars of each layer.
    """
    for tag, value in scalars(report, since=since, per_site=per_site).items():
        writer.add_scalar(tag, value, step)
    _draw(report, writer, step, images=images, text=text, tab=tab)


def append(report: Report, file: EventFile, step: int, *, images: bool, text: bool, tab: bool) -> None:
    """Append a report's pictures, text and tab to an event file: all of them, or none.

    Args:
        report: The report.
        file: The event file.
        step: The trainer's step, for the x axis.
        images: Whether to draw pictures.
        text: Whether to write the diagnosis.
        tab: Whether to write the report for Neuronscope's own tab.

    Raises:
        OSError: The file cannot be written, or the disk is full.
    """
    require_room(file.run)  # before any work is done
    events = EncodedEvents()
    _draw(report, events, step, images=images, text=text, tab=tab)
    file.append(events.data)


def _draw(
    report: Report, writer: EventWriter | EncodedEvents, step: int, *, images: bool, text: bool, tab: bool
) -> None:
    if images:
        from neuronscope.writers.pictures import heatmap, overview  # Pillow, only where pictures are drawn

        tag = f"neuronscope/{metric('overview', report.phase)}"
        writer.add_image(tag, overview(report), step, dataformats="HWC")
        for name, site in _heatmaps(report):
            picture = heatmap(site, report.phase, provisional_note(report, site.examples) if site.positions else "")
            tag = f"neuronscope.{metric('neurons', report.phase)}/{name}"
            writer.add_image(tag, picture, step, dataformats="HWC")
    if text:
        writer.add_text(f"neuronscope/{metric('diagnosis', report.phase)}", diagnosis(report), step)
    if images:
        for histogram in _density_histograms(report):
            _add_summary(writer, histogram, step)
    if tab:
        _add_summary(writer, tab_summary(report), step)


class Dashboard:
    """Writes reports to the folder of a ``SummaryWriter``, and remembers the steps that it wrote.

    It never writes a lower step than before: TensorBoard's data server drops the history of a tag when a lower step
    comes. Scalars go through the writer. Pictures, text and tab go to an event file in the subfolder
    ``neuronscope``, so that they cannot end a training whose disk is full: what cannot be written is left out, with
    one warning.
    """

    def __init__(self, writer: EventWriter) -> None:
        self._writer = writer
        folder = folder_of(writer)
        self._file = None if folder is None else EventFile(folder)
        self._warned = False
        self._written: dict[str, tuple[int, int]] = {}  # phase → (step written at, report.global_step)

    def write(
        self,
        report: Report,
        step: int | None = None,
        *,
        images: bool = True,
        text: bool = True,
        tab: bool = True,
        per_site: bool = True,
    ) -> bool:
        """Write a report as :func:`write` does, unless its phase was written at this step or a later one.

        A full disk or a missing folder gives one warning and no error.

        Args:
            report: The report.
            step: The trainer's step; ``None`` = ``report.global_step``.
            images: Whether to draw pictures.
            text: Whether to write the diagnosis.
            tab: Whether to write the report for Neuronscope's own tab.
            per_site: Whether to write the scalars of each layer.

        Returns:
            Whether all of it was written.
        """
        step = report.global_step if step is None else step
        last_step, since = self._written.get(report.phase, (-1, -1))
        if step <= last_step:
            return False
        drawn = {"images": images, "text": text, "tab": tab}
        try:
            if self._file is not None:
                require_room(self._file.run)
                require_room_in_file(self._file.run)
            write(report, self._writer, step, since=since, images=False, text=False, tab=False, per_site=per_site)
            self._writer.flush()  # now: the writer's thread would keep an error, and raise it in the training
            self._written[report.phase] = (step, report.global_step)
            if self._file is None:
                _draw(report, self._writer, step, **drawn)
            elif any(drawn.values()):
                append(report, self._file, step, **drawn)
        except OSError as error:
            self._warn(error)
            return False
        return True

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            warn_user(f"Neuronscope could not write to TensorBoard; training goes on. {type(error).__name__}: {error}")

    def state_dict(self) -> dict[str, list[int]]:
        """Return the last steps written, by phase, as plain data for a checkpoint."""
        return {phase: list(steps) for phase, steps in self._written.items()}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Continue where another run stopped, so that its deaths are not counted again.

        Raises:
            UsageError: ``state`` does not come from :meth:`state_dict`.
        """
        try:
            self._written = {str(phase): (int(step), int(since)) for phase, (step, since) in state.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UsageError(
                f"Expected argument `state` to be what Dashboard.state_dict() gives, but got {state!r}."
            ) from error


def _heatmaps(report: Report) -> list[tuple[str, SiteReport]]:
    """Return the layers that get a heat map, each with the last part of its tag."""
    if len(report.layers) <= MOST_HEATMAPS:
        return [(card_name(site.name), site) for site in report.layers]
    return [(f"worst-{rank}", site) for rank, site in enumerate(worst_first(report.layers)[:MOST_HEATMAPS], 1)]


def _add_summary(writer: Any, made: Summary, step: int) -> None:
    """Write a summary to the event file of a ``SummaryWriter`` or :class:`EncodedEvents`.

    A ``SummaryWriter`` has no method for a whole summary. Its ``file_writer`` has: a public attribute in torch and
    tensorboardX, though neither documents it. It is ``None`` after the writer was closed; writing a scalar opens it.
    """
    file_writer = writer.file_writer
    if file_writer is None:
        raise UsageError("Expected argument `writer` to be open, but its file was closed: write a scalar to open it.")
    if type(file_writer).__module__.partition(".")[0] == "tensorboardX":  # accepts only protos of its own
        from tensorboardX.proto.summary_pb2 import Summary as ForeignSummary

        file_writer.add_summary(ForeignSummary.FromString(made.SerializeToString()), step)
    else:
        file_writer.add_summary(made, step)


def tab_summary(report: Report) -> Summary:
    """Return a report as the summary that the tab reads.

    It has one tag for each phase, ``neuronscope/report`` (``neuronscope/val_report``): a uint8 tensor that holds the
    whole report as it is now, so that the newest of a run is all that TensorBoard must keep. Other tabs ignore it.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    with requiring("TensorBoard", "writing its tab's data", "tensorboard"):
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.util.tensor_util import make_tensor_proto
    content = json.dumps({"phase": report.phase}).encode("ascii")
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=content),
        data_class=summary_pb2.DATA_CLASS_TENSOR,  # without it the run does not show at all
    )
    tensor = make_tensor_proto(np.frombuffer(to_bytes(report), np.uint8))
    tag = f"neuronscope/{metric(TAB_TAG, report.phase)}"
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])


def _density_histograms(report: Report) -> list[Summary]:
    """Return a histogram of log10 firing densities for each sparse layer of which any latent fired.

    Latents that never fired are in no bin. A network without sparse layers needs no TensorBoard for this.
    """
    return [
        _histogram(site, f"neuronscope.{metric('log10_density', report.phase)}/{safe(site.name)}")
        for site in report.layers
        if site.kind == "sparse" and np.isfinite(site.log10_density).any()
    ]


def _histogram(site: SiteReport, tag: str) -> Summary:
    from tensorboard.compat.proto import summary_pb2

    counts, edges = site.density_histogram(bins_per_decade=5)
    values = site.log10_density[np.isfinite(site.log10_density)]
    histogram = summary_pb2.HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.astype(float).tolist()],
    )
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, histo=histogram)])
