"""Masks of positions: where the mask of a forward is found, which tensors it fits, and that counts stay exact."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuronscope.attach.call_arguments import CallArguments
from neuronscope.attach.masks import PositionMask, kept
from neuronscope.callbacks import DeadNeuronMonitor, Monitor
from neuronscope.count.compiled_graphs import add_outputs_in_graph, leave_out
from neuronscope.count.counters import SiteCounters, add_gradients, add_outputs
from neuronscope.count.cpu_kernels import ScratchBuffers
from neuronscope.count.positions import blank_positions, keep_positions, mask_dims
from neuronscope.errors import NeuronscopeWarning, UsageError
from neuronscope.options import WatchOptions
from tests.attach.call_counter import CallCounter

TOKENS = torch.ones(2, 5, dtype=torch.int64)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


class Decoder(nn.Module):
    """A language model's signature."""

    def forward(self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None) -> None: ...


class Translator(nn.Module):
    """The signature of a model with an encoder and a decoder."""

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, decoder_input_ids: Any = None, labels: Any = None
    ) -> None: ...


def _find(*args: Any, option: Any = "attention_mask", model: nn.Module | None = None, **kwargs: Any) -> Any:
    model = model or Decoder()
    found = PositionMask(option, CallArguments(model)).find(model, args, kwargs)
    assert found is None or found.dtype is torch.bool
    return None if found is None else found.int().tolist()


def test_the_mask_is_found_by_name_and_by_position() -> None:
    assert _find(TOKENS, attention_mask=MASK) == MASK.tolist()
    assert _find(TOKENS, MASK) == MASK.tolist()
    assert _find(TOKENS) is None
    assert _find(TOKENS, MASK, option=None) is None
    assert _find(TOKENS, MASK, option="another_mask") is None


def test_a_function_gives_the_mask() -> None:
    assert _find(TOKENS, MASK, option=lambda args, kwargs: args[1] == 0) == (1 - MASK).tolist()
    assert _find(TOKENS, MASK, option=lambda args, kwargs: None) is None


@pytest.mark.parametrize("answer", [torch.ones(3), torch.ones(2, 1, 5, 5), "mask"], ids=["1-d", "4-d", "text"])
def test_a_function_that_returns_no_mask_warns_once_and_everything_counts(answer: Any) -> None:
    model = Decoder()
    mask = PositionMask(lambda args, kwargs: answer, CallArguments(model))
    with pytest.warns(NeuronscopeWarning, match=r"`mask` to return a tensor of shape \(B, T\)"):
        assert mask.find(model, (), {}) is None
    assert mask.find(model, (), {}) is None


def test_a_function_that_fails_warns_and_the_forward_goes_on() -> None:
    with pytest.warns(NeuronscopeWarning, match="it raised KeyError"):
        assert _find(TOKENS, option=lambda args, kwargs: kwargs["mask"]) is None


def test_a_causal_mask_is_no_mask_of_positions() -> None:
    assert _find(TOKENS, torch.ones(2, 1, 5, 5)) is None
    assert _find(TOKENS, torch.ones(2, 5, 5)) is None


@pytest.mark.parametrize(
    "mask",
    [MASK, MASK.bool(), MASK.float(), MASK.half(), (MASK - 1) * 1e4, torch.where(MASK > 0, 0.0, -torch.inf)],
    ids=["int", "bool", "float", "half", "added", "infinite"],
)
def test_every_kind_of_mask_keeps_the_same_positions(mask: Tensor) -> None:
    assert torch.equal(kept(mask.float() if mask.dtype is torch.int64 and mask.min() < 0 else mask), MASK.bool())


def test_with_a_cache_the_mask_of_the_new_tokens_is_its_last_columns() -> None:
    past = [torch.ones(2, 1, 4, 3)]
    mask = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    assert _find(TOKENS[:, :2], mask, past) == mask[:, -2:].tolist()
    assert _find(TOKENS[:, :2], mask) == mask.tolist()  # fits no tensor, and so leaves nothing out


def test_where_encoder_and_decoder_are_equally_long_no_mask_is_applied() -> None:
    model = Translator()
    assert _find(TOKENS, MASK, decoder_input_ids=TOKENS[:, :3], model=model) == MASK.tolist()
    assert _find(TOKENS, MASK, decoder_input_ids=TOKENS, model=model) is None
    assert _find(TOKENS, MASK, labels=TOKENS, model=model) is None


@pytest.mark.parametrize(
    ("shape", "axis", "dims"),
    [
        ((2, 5, 8), 2, 2),
        ((2, 5, 4, 8), 3, 2),
        ((2, 5, 8, 4), 2, 2),
        ((10, 8), 1, 1),
        ((10, 3, 8), 2, 1),
        ((2, 8), 1, 0),
        ((2, 5, 8), 1, 0),
        ((5, 2, 8), 2, 0),
        ((2, 6, 8), 2, 0),
        ((3, 5, 8), 2, 0),
        ((10, 8), 0, 0),
        ((8,), 0, 0),
        ((2, 5), 1, 0),
    ],
)
def test_a_mask_fits_tensors_that_begin_with_its_dimensions(shape: tuple[int, ...], axis: int, dims: int) -> None:
    assert mask_dims(shape, axis, (2, 5)) == dims
    tensor = torch.randn(shape)
    part, new_axis = keep_positions(tensor, axis, MASK.bool())
    blank, left_out = blank_positions(tensor, axis, MASK.bool())
    if dims == 0:
        assert part is tensor
        assert blank is tensor
        assert (new_axis, left_out) == (axis, None)
        return
    rows = tensor.movedim(axis, -1).reshape(10, -1, shape[axis])[MASK.bool().reshape(-1)]
    assert torch.equal(part.movedim(new_axis, -1).reshape(-1, shape[axis]), rows.reshape(-1, shape[axis]))
    assert part.shape[new_axis] == shape[axis]
    assert left_out is not None
    assert int(left_out) == (tensor.numel() - part.numel()) // shape[axis]
    assert torch.equal(blank.sum(), part.sum()) or torch.allclose(blank.sum(), part.sum())


def test_without_a_mask_every_tensor_stays_as_it_is() -> None:
    tensor = torch.randn(2, 5, 8)
    assert keep_positions(tensor, 2, None) == (tensor, 2)
    assert blank_positions(tensor, 2, None) == (tensor, None)


def _counts(counters: SiteCounters) -> list[Any]:
    tensors = counters.flush()
    return [*(each.tolist() for each in tensors[:6]), *counters.totals()]


@pytest.mark.parametrize(("shape", "axis"), [((2, 5, 8), 2), ((2, 5, 8, 3), 2), ((10, 8), 1)])
@pytest.mark.parametrize("broken", [False, True], ids=["finite", "nan in the padding"])
def test_both_ways_of_leaving_out_give_the_same_counts(shape: tuple[int, ...], axis: int, broken: bool) -> None:
    torch.manual_seed(0)
    by_part, by_blank = (SiteCounters(8, torch.device("cpu")) for _ in range(2))
    scratch = ScratchBuffers()
    for step in range(3):
        y, gradient = torch.relu(torch.randn(shape)), torch.relu(torch.randn(shape))
        if broken:
            y.reshape(10, -1)[3] = torch.nan  # position (0, 3) is padding
        part, part_axis = keep_positions(y, axis, MASK.bool())
        add_outputs(by_part, part, part_axis, 2, step, scratch, 0.0)
        part, part_axis = keep_positions(gradient, axis, MASK.bool())
        add_gradients(by_part, part, part_axis, scratch)
        blank, left_out = blank_positions(y, axis, MASK.bool())
        add_outputs(by_blank, blank, axis, 2, step, scratch, 0.0)
        assert left_out is not None
        leave_out(by_blank, left_out)
        blank, left_out = blank_positions(gradient, axis, MASK.bool())
        add_gradients(by_blank, blank, axis, scratch)
        assert left_out is not None
        by_blank.gradient_positions -= int(left_out)
        by_blank.tensors.zero_gradients.sub_(left_out)
    assert _counts(by_part)[:3] == _counts(by_blank)[:3]
    assert np.allclose(_counts(by_part)[3], _counts(by_blank)[3])
    assert _counts(by_part)[4:] == _counts(by_blank)[4:]
    assert by_part.totals()[0] == 3 * 8 * (3 if len(shape) == 4 else 1)


def test_a_neuron_that_fires_at_padding_only_never_fired() -> None:
    y = torch.zeros(2, 5, 1)
    y[0, 4] = 1.0
    counters = SiteCounters(1, torch.device("cpu"))
    blank, left_out = blank_positions(y, 2, MASK.bool())
    add_outputs(counters, blank, 2, 2, 0, ScratchBuffers(), 0.0)
    assert left_out is not None
    leave_out(counters, left_out)
    tensors = counters.flush()
    assert (tensors.zero_outputs.item(), counters.totals()[0], tensors.last_active.item()) == (8, 8, -1)


def test_the_compiler_traces_finding_blanking_and_leaving_out() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return torch.relu(x)

    model = Net()
    positions = PositionMask("attention_mask", CallArguments(model))
    counters = SiteCounters(4, torch.device("cpu"))
    counters.enter_graph()
    counters.clock = torch.zeros((), dtype=torch.int64)

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        blank, left_out = blank_positions(y.detach(), 2, positions.find(module, args, kwargs))
        add_outputs_in_graph(counters, blank, 2, 2, 0.0)
        if left_out is not None:
            leave_out(counters, left_out)

    model.register_forward_hook(count, with_kwargs=True)
    x = torch.randn(2, 5, 4)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x, attention_mask=MASK)
    expected = (torch.relu(x)[MASK.bool()] == 0).sum(0)
    assert counters.flush().zero_outputs.tolist() == expected.tolist()
    assert counters.totals()[0] == 8


def test_no_function_mode_of_the_user_sees_the_mask() -> None:
    model = Decoder()
    mask = PositionMask("attention_mask", CallArguments(model))
    with CallCounter() as spy:
        mask.find(model, (TOKENS, MASK, [torch.ones(2, 1, 1, 3)]), {})
        assert spy.calls == 1  # the test's own `torch.ones`


@pytest.mark.parametrize("wrong", ["", 1, True, ["attention_mask"]], ids=str)
def test_an_option_of_another_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="argument `mask` to be the name of an argument"):
        WatchOptions(mask=wrong)


def test_callbacks_take_both_options_and_keep_the_key_of_their_state() -> None:
    for callback, examples in product((Monitor, DeadNeuronMonitor), (None, 1, len)):
        monitor = callback(examples=examples, mask="padding")
        assert (monitor.options.examples, monitor.options.mask) == (examples, "padding")
        assert monitor.state_key == callback().state_key  # a function's address would change it
        assert callback().options.mask is None


def test_the_callback_for_hugging_face_leaves_padding_out_unless_told_otherwise() -> None:
    transformers = pytest.importorskip("neuronscope.callbacks.transformers")
    assert transformers.DeadNeuronCallback().options.mask == "attention_mask"
    assert transformers.DeadNeuronCallback(mask=None).options.mask is None
