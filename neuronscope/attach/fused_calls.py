"""Find the calls that torch runs in one fused kernel, as long as no hook and no function mode is in its way.

In evaluation without gradients, attention and a transformer's encoder layer have such a *fast path*. It rounds
differently, so a watched model must take it whenever an unwatched one would. Torch looks for hooks on every module of
an encoder layer, and for function modes at all three classes.

``torch.compile`` traces the same code. It sees no function mode there, and of the three classes only an encoder layer
goes the fast path in a graph. So its hooks are off while it is traced (:class:`TracedLayers`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.hooks import RemovableHandle

from neuronscope.attach.compiling import ask_modes_about, at_graph_end, guards_hooks, stop_asking_modes_about, unwatched
from neuronscope.attach.hook_handles import Taken, put_back, tables, take_off

__all__ = [
    "FUSABLE",
    "REASON",
    "TRACED_KERNEL",
    "HiddenHooks",
    "TracedLayers",
    "hidden_activation",
    "last_weight",
    "runs_fused",
]

FUSABLE = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
REASON = (
    "in evaluation without gradients torch runs its layer in one fused kernel, which a hook would switch off. To count "
    "it there too: `torch.backends.mha.set_fastpath_enabled(False)`"
)
#: Devices for which torch has no such kernel.
_WITHOUT_KERNEL = ("mps", "meta")
#: What a graph calls that runs an encoder layer fused.
TRACED_KERNEL: Callable[..., Tensor] = torch._transformer_encoder_layer_fwd
_WEIGHTS_OF_ATTENTION = attrgetter("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_WEIGHTS_OF_LAYER = attrgetter(
    "norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias", "linear1.weight", "linear1.bias", "linear2.weight",
    "linear2.bias",
)  # fmt: skip


def runs_fused(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    is_ours: Callable[[Any], bool],
    *,
    compiled: bool = False,
) -> bool:
    """Return whether torch would run a call in a fused kernel if nothing of ours was in its way.

    The conditions are those of the ``forward`` of the three classes; the tests compare them with what torch does.

    Args:
        module: A module of one of the classes :data:`FUSABLE`.
        args: The positional arguments of its forward.
        kwargs: The keyword arguments of its forward.
        is_ours: Whether a hook or a function mode is one of Neuronscope's.
        compiled: Whether ``torch.compile`` traces the call, or runs a graph of it.
    """
    if module.training or torch.is_autocast_enabled() or not torch.backends.mha.get_fastpath_enabled():
        return False
    if compiled and (not isinstance(module, nn.TransformerEncoderLayer) or guards_hooks()):
        return False
    modes = (torch._C._get_function_stack_at(depth) for depth in range(torch._C._len_torch_function_stack()))
    if not compiled and not all(map(is_ours, modes)):
        return False
    with contextlib.suppress(AttributeError), unwatched():  # a subclass has other parts, and a forward of its own
        x = args[0] if args else kwargs.get("query", kwargs.get("src"))
        if not isinstance(x, Tensor) or x.dim() != 3 or x.device.type in _WITHOUT_KERNEL:
            return False
        if isinstance(module, nn.MultiheadAttention):
            return _is_self_attention(x, args, kwargs) and _attends_fused(module) and _takes_plain_tensors(module, x)
        if isinstance(module, nn.TransformerEncoder):
            return _goes_nested(module, x, args, kwargs)
        return _layer_runs_fused(module, x, args, kwargs, is_ours)
    return False


def _is_self_attention(x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    key = args[1] if len(args) > 1 else kwargs.get("key")
    return key is x and (args[2] if len(args) > 2 else kwargs.get("value")) is x


def _attends_fused(attention: Any) -> bool:
    """Whether the options of an attention allow its fused kernel."""
    extra = attention.bias_k is not None or attention.bias_v is not None or attention.add_zero_attn
    projected = attention._qkv_same_embed_dim and attention.in_proj_bias is not None
    return bool(attention.batch_first and projected and not extra and attention.num_heads % 2 == 0)


def _takes_plain_tensors(module: Any, x: Tensor) -> bool:
    """Whether no tensor of a call needs a gradient or follows the protocol of torch functions itself."""
    if isinstance(module, nn.MultiheadAttention):
        tensors = (x, *_WEIGHTS_OF_ATTENTION(module))
    else:
        tensors = (x, *_WEIGHTS_OF_ATTENTION(module.self_attn), *_WEIGHTS_OF_LAYER(module))
    if not all(type(each) in (Tensor, nn.Parameter, FakeTensor) for each in tensors):
        return False
    return not (torch.is_grad_enabled() and any(each.requires_grad for each in tensors))


def _layer_runs_fused(
    layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_ours: Callable[[Any], bool]
) -> bool:
    if not _attends_fused(layer.self_attn) or not layer.activation_relu_or_gelu or layer.norm1.eps != layer.norm2.eps:
        return False
    if x.is_nested and any(each is not None for each in (*args[1:3], *map(kwargs.get, ("src_mask", _PADDING)))):
        return False
    hooks = (hook for module in layer.modules() for table in tables(module) for hook in table.values())
    return all(map(is_ours, hooks)) and _takes_plain_tensors(layer, x)


_PADDING = "src_key_padding_mask"


def _goes_nested(encoder: Any, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether an encoder packs padded input into nested tensors, so that all its layers must run fused."""
    mask = args[1] if len(args) > 1 else kwargs.get("mask")
    padding = args[2] if len(args) > 2 else kwargs.get(_PADDING)
    first = encoder.layers[0]
    if padding is None or mask is not None or not encoder.use_nested_tensor or first.training:
        return False
    return not x.is_nested and _takes_plain_tensors(first, x)


def last_weight(module: Any) -> Tensor | None:
    """Return the weight whose units a call of one of the classes :data:`FUSABLE` gives; ``None`` if it has none."""
    if isinstance(module, nn.TransformerEncoder):
        return last_weight(module.layers[-1]) if module.norm is None else module.norm._parameters.get("weight")
    if isinstance(module, nn.TransformerEncoderLayer):
        last: Any = module.linear2 if module.norm_first else module.norm2
    else:
        last = module.out_proj
    weight: Tensor | None = last._parameters.get("weight")  # a weight that is computed is not computed again
    return weight


def hidden_activation(layer: nn.TransformerEncoderLayer) -> str:
    """Return the name of the activation that an encoder layer applies in its fused kernel."""
    return "relu" if layer.activation_relu_or_gelu == 1 else "gelu"


class HiddenHooks:
    """Takes the hooks off a module and all inside it while it runs, and puts them back when it has run.

    While no hook is on the module, none can tell when it has run. A global hook does, which is registered for the call.

    Args:
        ended: Called with the module and its output when it has run; the output is ``None`` if it failed, and then
            torch calls the hooks of the module that were put back.

    >>> from neuronscope.attach.gradient_hooks import InertHook
    >>> module, order = torch.nn.ReLU(), []
    >>> hidden = HiddenHooks(lambda module, output: order.append("ended"))
    >>> class Hide(InertHook):
    ...     def __call__(self, module, args):
    ...         hidden.take_off(module)
    >>> _ = module.register_forward_pre_hook(Hide())
    >>> _ = module(torch.ones(1))
    >>> order, len(module._forward_pre_hooks)
    (['ended'], 1)
    """

    def __init__(self, ended: Callable[[nn.Module, Any], None]) -> None:
        self._ended = ended
        self._module: nn.Module | None = None
        self._taken: Taken = []
        self._handle: RemovableHandle | None = None

    def take_off(self, module: nn.Module) -> None:
        """Take the hooks off for the call of a module that has begun.

        Args:
            module: The module. It and the modules inside it have no hooks but Neuronscope's.
        """
        self.put_back()
        self._module = module
        self._taken = take_off(module.modules(), running=True)
        self._handle = register_module_forward_hook(self._after, always_call=True)

    def _after(self, module: nn.Module, _args: Any, output: Any) -> None:
        if module is self._module:
            self._put_back()
            if output is not None:  # else torch is looking through the global hooks, and none may be removed
                self.put_back()
            self._ended(module, output)

    def _put_back(self) -> None:
        put_back(self._taken)
        self._taken = []
        self._module = None

    def put_back(self) -> None:
        """Put the hooks back, if they are off."""
        if self._module is None and self._handle is None:
            return
        self._put_back()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


class TracedLayers:
    """Takes the hooks off an encoder layer and all inside it while ``torch.compile`` traces it.

    The compiler asks a module for its hooks each time anew, and makes no guard of the answer. The hooks are back as
    soon as the fused kernel is written into the graph, and at the end of the graph in any case. The methods are run
    while the compiler traces, and are not traced themselves.
    """

    def __init__(self) -> None:
        self._layer: nn.TransformerEncoderLayer | None = None
        self._taken: Taken = []

    @property
    def layer(self) -> nn.TransformerEncoderLayer | None:
        """The layer whose kernel is to be written into the graph next."""
        return self._layer

    def take_off(self, layer: nn.TransformerEncoderLayer) -> None:
        """Take the hooks off a layer whose hooks before its forward have been traced.

        Args:
            layer: The layer.
        """
        if not self._taken:
            at_graph_end(self.put_back)
        self._layer = layer
        self._taken += take_off(layer.modules(), running=True)
        ask_modes_about([TRACED_KERNEL])

    def put_back(self) -> None:
        """Put the hooks back, if they are off."""
        put_back(self._taken)
        self._layer, self._taken = None, []
        stop_asking_modes_about([TRACED_KERNEL])
