"""How many independent examples a forward is given: the rule, its options, and the inputs that it must not misread."""

from __future__ import annotations

import inspect
from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

import neuronscope as ns
from neuronscope.attach import call_arguments as arguments_module
from neuronscope.attach import examples as examples_module
from neuronscope.attach import masks as masks_module
from neuronscope.attach.call_arguments import CallArguments
from neuronscope.attach.compiling import skip_frames
from neuronscope.attach.examples import ExampleCounter, count_examples, first_tensor, is_time_first
from neuronscope.attach.masks import PositionMask
from neuronscope.count.counters import SiteCounters
from neuronscope.errors import NeuronscopeWarning, UsageError
from neuronscope.options import WatchOptions
from tests.attach.call_counter import CallCounter


class Anything(nn.Module):
    """A module that takes whatever it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> None: ...


class Decoder(nn.Module):
    """A language model's signature."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        *,
        cache_position: Any = None,
    ) -> None: ...


class Transposing(nn.Module):
    """A model ``(batch, time, feature)`` around layers that take time first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(4, 4)

    def forward(self, x: Tensor) -> None: ...


@dataclass
class Batch:
    """Two tensors of one batch."""

    label: str
    values: Tensor


Pair = namedtuple("Pair", ["first", "second"])  # torch users write it so


class Graphs:
    """A batch of graphs, as PyTorch Geometric makes it."""

    def __init__(self) -> None:
        self._store = UserDict(x=torch.ones(50, 4), edge_index=torch.ones(2, 90))

    @property
    def num_graphs(self) -> int:
        """Number of graphs."""
        return 6


def _counter(option: Any = "auto", model: nn.Module | None = None) -> tuple[ExampleCounter, nn.Module]:
    model = model or Anything()
    return ExampleCounter(option, model, CallArguments(model)), model


def _count(*args: Any, option: Any = "auto", model: nn.Module | None = None, **kwargs: Any) -> int | None:
    counter, model = _counter(option, model)
    return counter.count(model, args, kwargs)


@pytest.mark.parametrize(
    ("value", "examples"),
    [
        (torch.ones(7, 3), 7),
        ({"x": torch.ones(7, 3)}, 7),
        (UserDict(x=torch.ones(7, 3)), 7),
        (Batch("a", torch.ones(7, 3)), 7),
        (SimpleNamespace(name="a", inner=SimpleNamespace(x=torch.ones(7, 3))), 7),
        (Pair(torch.ones(7, 3), torch.ones(9, 3)), 7),
        (Graphs(), 6),
        (pack_sequence([torch.ones(5, 2), torch.ones(3, 2), torch.ones(2, 2)]), 3),
        ("text", None),
        (nn.Linear(7, 7), None),
    ],
    ids=["tensor", "dict", "mapping", "dataclass", "object", "namedtuple", "graphs", "packed", "text", "module"],
)
def test_examples_are_the_rows_of_the_first_tensor_in_any_container(value: Any, examples: int | None) -> None:
    assert count_examples([value]) == examples


@pytest.mark.parametrize(
    ("shapes", "examples"),
    [
        ([(3, 8, 8)], 1),
        ([(3, 8, 8)] * 5, 5),
        ([(3, 8, 8), (3, 6, 9)], 2),
        ([(16, 8, 8)] * 3, 3),
        ([(9, 2), (7, 2), (4, 2)], 3),
        ([(100, 3)], 1),
        ([(9,), (9,)], 2),
        ([(32, 10), (32, 3, 8, 8)], 32),
        ([(32, 10), (32, 4)], 2),
        ([(1, 10), (1, 4)], 1),
    ],
    ids=str,
)
def test_a_list_of_tensors_has_no_more_examples_than_any_reading_of_it(
    shapes: list[tuple[int, ...]], examples: int
) -> None:
    tensors = [torch.ones(shape) for shape in shapes]
    assert _count(tensors) == examples
    assert _count(tuple(tensors)) == examples
    assert _count([{"image": tensor} for tensor in tensors]) == examples


def test_arguments_count_in_the_order_of_the_parameters_and_not_of_the_call() -> None:
    late = {"cache_position": torch.arange(9), "attention_mask": torch.ones(4, 9), "input_ids": torch.ones(4, 9)}
    assert _count(model=Decoder(), **late) == 4


def test_a_number_before_the_batch_is_not_taken_for_the_batch() -> None:
    assert _count(torch.tensor(0.5), torch.ones(6, 2)) == 6


def test_a_forward_without_any_tensor_claims_no_example() -> None:
    assert _count("a text", 3) is None


def test_objects_that_refer_to_each_other_do_not_keep_the_search_going() -> None:
    ring = [SimpleNamespace() for _ in range(20)]
    for one in ring:
        one.others = ring
        one.call = one
    assert _count(ring[0]) is None
    ring[7].batch = torch.ones(3, 2)
    assert first_tensor(ring[0]) is ring[7].batch


def test_the_option_names_the_dimension_of_the_batch() -> None:
    assert _count(torch.ones(9, 4, 2), option=1) == 4
    assert _count(torch.ones(9, 4, 2), option=-1) == 2
    assert _count(torch.ones(9), option=1) is None


def test_the_option_none_claims_no_example() -> None:
    assert _count(torch.ones(9, 4), option=None) is None


def test_a_function_says_how_many_examples_there_are() -> None:
    def lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        return len(args[0]) + kwargs["more"]

    assert _count([1, 2, 3], option=lengths, more=4) == 7
    assert _count(torch.ones(2), option=lambda args, kwargs: None) is None


@pytest.mark.parametrize("answer", [-1, 2.5, True, "many", torch.tensor(3)], ids=str)
def test_a_function_that_returns_no_number_warns_once_and_claims_nothing(answer: Any) -> None:
    counter, model = _counter(lambda args, kwargs: answer)
    with pytest.warns(NeuronscopeWarning, match="`examples` to return a number of examples"):
        assert counter.count(model, (), {}) is None
    assert counter.count(model, (), {}) is None  # a second warning would be an error


def test_a_function_that_fails_warns_and_the_forward_goes_on() -> None:
    with pytest.warns(NeuronscopeWarning, match="it raised IndexError"):
        assert _count(option=lambda args, kwargs: len(args[0])) is None


@pytest.mark.parametrize("wrong", [True, "rows", 1.0, [0]], ids=str)
def test_an_option_of_another_kind_is_refused(wrong: Any) -> None:
    with pytest.raises(UsageError, match="argument `examples` to be 'auto'"):
        WatchOptions(examples=wrong)


@pytest.mark.parametrize(
    ("module", "time_first"),
    [
        (nn.LSTM(2, 2), True),
        (nn.LSTM(2, 2, batch_first=True), False),
        (nn.MultiheadAttention(2, 1), True),
        (nn.TransformerDecoderLayer(4, 1, batch_first=True).self_attn, False),
        (nn.Linear(2, 2), False),
    ],
)
def test_a_module_says_itself_whether_it_takes_time_first(module: nn.Module, time_first: bool) -> None:
    assert is_time_first(module) is time_first


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 1, enable_nested_tensor=False),
        nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 1),
        nn.LSTM(8, 4),
        nn.MultiheadAttention(8, 2),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_long_sequence_given_time_first_is_one_example(model: nn.Module) -> None:
    counter, _ = _counter(model=model)
    sequence = torch.ones(512, 1, 8)
    for _ in range(2):  # what is learned in the first forward must not raise the second's number
        assert counter.count(model, (sequence, sequence), {}) == 1
        counter.note_layout(model, (sequence,), {})


def test_the_same_model_given_its_batch_first_counts_all_rows() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    assert _count(torch.ones(512, 3, 8), model=model) == 512


def test_rows_count_once_an_inner_module_was_seen_to_get_them_on_its_batch_dimension() -> None:
    counter, model = _counter(model=Transposing())
    x = torch.ones(64, 20, 4)
    assert counter.count(model, (x,), {}) == 20  # holds in both layouts
    counter.note_layout(model.layer, (x.transpose(0, 1),), {})  # type: ignore[arg-type]
    assert counter.count(model, (x,), {}) == 64
    assert counter.count(model, (torch.ones(300, 20, 4),), {}) == 300


def test_square_inputs_teach_nothing_about_the_layout() -> None:
    counter, model = _counter(model=Transposing())
    counter.count(model, (torch.ones(20, 20, 4),), {})
    counter.note_layout(model.layer, (torch.ones(20, 20, 4),), {})  # type: ignore[arg-type]
    assert counter.count(model, (torch.ones(512, 1, 4),), {}) == 1


def test_modules_that_disagree_about_the_layout_leave_the_smaller_number() -> None:
    counter, model = _counter(model=Transposing())
    x = torch.ones(64, 20, 4)
    counter.count(model, (x,), {})
    for given in (x.transpose(0, 1), x, x.transpose(0, 1)):
        counter.note_layout(model.layer, (given,), {})  # type: ignore[arg-type]
    assert counter.count(model, (x,), {}) == 20


def test_tokens_of_a_time_first_model_are_bounded_by_both_dimensions() -> None:
    assert _count(torch.ones(35, 20, dtype=torch.int64), model=Transposing()) == 20


def test_the_users_word_on_the_batch_dimension_outranks_the_layout() -> None:
    assert _count(torch.ones(512, 40, 4), model=Transposing(), option=1) == 40
    assert _count(torch.ones(64, 20, 4), model=Transposing(), option=0) == 64


class Cache:
    """Keys and values by layer, as of a language model."""

    def __init__(self, length: int, *, trained: bool = False) -> None:
        self.layers = [SimpleNamespace(keys=None, values=None), SimpleNamespace(keys=None, values=None)]
        if length >= 0:
            for layer in self.layers:
                layer.keys = layer.values = torch.ones(4, 2, length, 8, requires_grad=trained)


PROMPT = {"input_ids": torch.ones(4, 5, dtype=torch.int64)}
NEXT = {"input_ids": torch.ones(4, 1, dtype=torch.int64)}


@pytest.mark.parametrize(
    "empty",
    [None, Cache(-1), Cache(0), ((torch.ones(4, 2, 0, 8),) * 2,), []],
    ids=["no", "new", "length 0", "old", "list"],
)
def test_prompts_are_examples(empty: Any) -> None:
    assert _count(model=Decoder(), past_key_values=empty, **PROMPT) == 4


@pytest.mark.parametrize(
    "full", [Cache(5), ((torch.ones(4, 2, 5, 8),) * 2,), {"layer0": torch.ones(4, 5)}], ids=["object", "tuples", "dict"]
)
@pytest.mark.parametrize("option", ["auto", 0])
def test_tokens_that_a_cache_is_given_with_are_no_new_examples(full: Any, option: Any) -> None:
    assert _count(model=Decoder(), past_key_values=full, option=option, **NEXT) == 0


def test_a_cache_is_found_at_its_position_too() -> None:
    assert _count(NEXT["input_ids"], torch.ones(4, 6), Cache(5), model=Decoder()) == 0


def test_a_trained_prefix_is_no_cache_of_earlier_examples() -> None:
    assert _count(model=Decoder(), past_key_values=Cache(5, trained=True), **PROMPT) == 4


def test_generation_without_cache_counts_the_prompts_once() -> None:
    counter, model = _counter(model=Decoder())
    tokens = [torch.ones(4, length, dtype=torch.int64) for length in (5, 6, 7, 7, 9)]
    with torch.no_grad():
        assert [counter.count(model, (each,), {}) for each in tokens] == [4, 0, 0, 4, 4]
    assert [counter.count(model, (each,), {}) for each in tokens] == [4, 4, 4, 4, 4]  # training


@pytest.mark.parametrize("first", [2, 4, 9], ids=["grows first", "as long as the window", "longer"])
def test_generation_with_a_window_that_slides_counts_the_prompts_once(first: int) -> None:
    counter, model = _counter(model=Decoder())
    text = torch.randint(9, (4, 20))
    windows = [text[:, max(0, length - 4) : length] for length in range(first, 20)]
    with torch.no_grad():
        seen = [counter.count(model, (each,), {}) for each in windows]
        other = counter.count(model, (torch.randint(9, 18, (4, 4)),), {})
    assert (seen, other) == ([4] + [0] * (19 - first), 4)


def test_batches_that_grow_by_one_token_are_no_generation() -> None:
    counter, model = _counter(model=Decoder())
    with torch.no_grad():
        assert [counter.count(model, (torch.randint(99, (4, length)),), {}) for length in range(3, 9)] == [4] * 6
        begin = torch.ones(4, 90, dtype=torch.int64)  # the same instruction before each question
        batches = [torch.cat([begin, torch.randint(99, (4, length))], 1) for length in range(3, 9)]
        assert [counter.count(model, (each,), {}) for each in batches] == [4] * 6


@pytest.mark.parametrize("most", [4, 70, 200], ids=["slides", "slides late", "grows"])
def test_a_search_with_beams_counts_the_prompts_once(most: int) -> None:
    counter, model = _counter(model=Decoder())
    tokens = torch.randint(99, (12, 3))
    seen = []
    with torch.no_grad():
        for _ in range(90):
            seen.append(counter.count(model, (tokens[:, -most:],), {}))
            better = torch.cat([torch.randint(low, low + 3, (3,)) for low in range(0, 12, 3)])
            tokens = torch.cat([tokens[better], torch.randint(99, (12, 1))], 1)
    assert seen == [12] + [0] * 89


def test_the_same_tokens_again_are_no_generation() -> None:
    counter, model = _counter(model=Decoder())
    with torch.no_grad():
        assert [counter.count(model, (torch.ones(4, 7, dtype=torch.int64),), {}) for _ in range(3)] == [4, 4, 4]


def test_a_translation_that_grows_counts_its_sources_once() -> None:
    counter, model = _counter()
    text, sources = torch.randint(9, (4, 9)), torch.randint(9, (4, 6))
    with torch.no_grad():
        assert [counter.count(model, (sources, text[:, :length]), {}) for length in range(1, 9)] == [4] + [0] * 7
        assert counter.count(model, (sources.clone(), text), {}) == 4  # others, however long
        images = torch.ones(4, 3, 8, 8)
        captions = [
            counter.count(model, (each, text[:, : 5 + n]), {}) for n, each in enumerate([images, images, images + 1])
        ]
    assert captions == [4, 0, 4]


class KeepsItsCache(nn.Module):
    """A language model whose cache is its own: a number says at which position the tokens begin."""

    def forward(self, tokens: Any, start_pos: Any = 0, input_pos: Any = None) -> None: ...


def test_tokens_behind_the_first_position_are_no_new_examples() -> None:
    tokens, model = torch.ones(4, 1, dtype=torch.int64), KeepsItsCache()
    positions = [torch.arange(3), torch.tensor([0]), torch.tensor([3])]
    with torch.no_grad():
        assert [_count(tokens, start, model=model) for start in (0, 5)] == [4, 0]
        assert [_count(tokens, model=model, input_pos=each) for each in positions] == [4, 4, 0]
    assert _count(tokens, 5, model=model) == 4  # a text in training may begin anywhere


def test_a_forward_that_goes_on_with_fewer_examples_takes_none_away() -> None:
    counters = SiteCounters(2, torch.device("cpu"))
    added = [counters.new_examples(*each) for each in ((1, 4, 20), (1, 0, 4), (1, 3, 4), (2, 4, 4))]
    assert added == [4, 0, 0, 4]


class StatesApart(nn.Module):
    """A recurrent language model that returns its state and takes it back, with the tokens that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell = nn.Embedding(9, 4), nn.GRUCell(4, 6)
        self.up, self.out = nn.Linear(6, 8), nn.Linear(8, 9)

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        memory = self.cell(self.embed(tokens), memory)
        return tokens, {"memory": memory, "logits": self.out(torch.relu(self.up(memory)))}


@pytest.mark.parametrize("gradients", [False, True])
def test_a_state_that_the_model_returned_brings_no_new_examples(gradients: bool) -> None:
    model, tokens = StatesApart(), torch.randint(9, (4,))
    with ns.watch(model) as scope, scope.phase("val"), torch.set_grad_enabled(gradients):
        for _ in range(2):
            memory = None
            for _ in range(5):  # the same tokens again, which were no work of the model
                memory = model(tokens, memory)[1]["memory"]
    (tally,) = scope.census("val").values()
    assert (tally.examples, tally.positions) == (2 * 4, 2 * 5 * 4)


def test_a_forward_that_is_given_a_reference_which_the_model_computed_has_examples() -> None:
    model, tokens = StatesApart(), torch.randint(9, (4,))
    with ns.watch(model) as scope:
        for _ in range(3):
            with torch.no_grad():
                memory = model(tokens)[1]["memory"]
            model(tokens, memory)[1]["logits"].sum().backward()
            scope.step()
    assert [tally.examples for tally in scope.census("train").values()] == [3 * 4]


class Halves(nn.Module):
    """An encoder and a decoder, one of which each forward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.decode = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, x: Tensor, half: str) -> Tensor:
        return self.encode(x) if half == "encode" else self.decode(x)


def test_a_layer_that_is_given_only_what_the_model_returned_has_examples() -> None:
    model = Halves()
    with ns.watch(model) as scope:
        for _ in range(3):
            model(model(torch.randn(6, 4), "encode"), "decode").sum().backward()
            scope.step()
    assert {name: tally.examples for name, tally in scope.census().items()} == {
        "encode.0/relu": 18,
        "decode.0/relu": 18,
    }


def test_a_state_that_is_detached_in_place_begins_new_examples() -> None:
    model, memory = StatesApart(), None
    with ns.watch(model) as scope:
        for _ in range(3):
            _, output = model(torch.randint(9, (4,)), memory)
            output["logits"].sum().backward()
            memory = output["memory"].detach_()
            scope.step()
    assert [tally.examples for tally in scope.census().values()] == [3 * 4]


def test_a_part_of_the_model_that_reads_what_the_model_returned_has_examples() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    model.append(nn.Sequential(nn.Linear(5, 3), nn.ReLU()))
    with ns.watch(model) as scope:
        for _ in range(3):
            model[2](model(torch.randn(6, 4))).sum().backward()
            scope.step()
    assert [tally.examples for tally in scope.census().values()] == [18, 18]


def test_while_the_compiler_traces_the_number_follows_from_shapes_alone() -> None:
    seen: list[Any] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.rnn = nn.ReLU(), nn.Identity()
            self.rnn.batch_first = False  # type: ignore[assignment]

        def forward(self, x: Tensor, pairs: Any = None, past: Any = None) -> Tensor:
            return self.relu(x)

    model = Net()
    counters = [ExampleCounter(option, model, CallArguments(model)) for option in ("auto", 0, 1, None)]

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        numbers = [counter.count(module, args, kwargs) for counter in counters]
        counters[0].note_layout(module, args, kwargs)
        seen.append([-1 if number is None else number for number in numbers])

    model.register_forward_pre_hook(count, with_kwargs=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.ones(9, 4, 2), pairs={"a": [torch.ones(2)]})
    compiled(torch.ones(9, 4, 2), past=[torch.ones(9, 4)])
    assert seen == [[4, 9, 4, -1], [0, 0, 0, -1]]


def test_no_function_mode_of_the_user_sees_how_examples_are_counted() -> None:
    counter, model = _counter(model=Transposing())
    with CallCounter() as spy:
        x = torch.ones(6, 4, 4)
        before = spy.calls
        counter.count(model, (x, [x, x]), {})
        counter.note_layout(model, (x,), {})
        assert spy.calls == before


def test_arguments_get_the_names_of_the_forward() -> None:
    model = Decoder()
    arguments = CallArguments(model)
    named = arguments.named(model, (1, 2), {"cache_position": 5, "past_key_values": 3, "other": 6})
    assert list(named.items()) == [
        ("input_ids", 1),
        ("attention_mask", 2),
        ("past_key_values", 3),
        ("cache_position", 5),
        ("other", 6),
    ]
    assert arguments.names(model) == tuple(inspect.signature(Decoder.forward).parameters)[1:]
    later = type("Later", (Decoder,), {})()  # a class that the model did not have when it was read
    assert list(arguments.named(later, (1,), {})) == ["input_ids"]
    anything = Anything()
    assert arguments.named(anything, (1, 2), {"x": 3}) == {"0": 1, "1": 2, "x": 3}


def test_a_hook_beside_a_compiled_graph_finds_examples_and_mask_as_it_is() -> None:
    seen: list[Any] = []

    class Net(nn.Module):
        def forward(self, x: Tensor, attention_mask: Any = None, images: Any = None, past: Any = None) -> Tensor:
            return torch.relu(x)

    model = Net()
    arguments = CallArguments(model)
    options: tuple[Any, ...] = ("auto", lambda args, kwargs: sum(number for number in (1, 2)))
    counters = [ExampleCounter(option, model, arguments) for option in options]
    mask = PositionMask("attention_mask", arguments)

    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(counters[0].count(module, args, kwargs))
        seen.append(counters[1].count(module, args, kwargs))
        seen.append(mask.find(module, args, kwargs) is None)

    skip_frames([examples_module, masks_module, arguments_module])
    torch._dynamo.eval_frame.skip_code(count.__code__)
    model.register_forward_pre_hook(count, with_kwargs=True)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.ones(9, 4), attention_mask=torch.ones(9, 4), past=[torch.ones(9, 1)])
    compiled(torch.ones(9, 4), images=[torch.ones(2, 3), torch.ones(3, 3)])
    assert seen == [0, 3, False, 9, 3, True]


def test_examples_are_added_by_the_first_call_of_a_graph_that_runs() -> None:
    counters = SiteCounters(3, torch.device("cpu"))
    whole, part, next_part = ("a", 0), ("b", 1), ("c", 0)
    assert [counters.is_first_call(1, whole), counters.is_first_call(1, whole)] == [True, False]
    assert [counters.is_first_call(1, part), counters.is_first_call(1, part)] == [True, False]  # the whole was dropped
    counters.tensors.traced.add_(1)  # the part runs
    assert [counters.is_first_call(1, next_part), counters.is_first_call(2, next_part)] == [False, True]
