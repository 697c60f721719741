"""Train the sparse autoencoders of three libraries, and return their own counts of firing beside Neuronscope's."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import neuronscope as ns

__all__ = ["DEAD_AFTER", "INPUTS", "LATENTS", "ROWS", "STEPS", "Counted", "dictionary_learning", "sae_lens", "sparsify"]

INPUTS, LATENTS, ROWS, STEPS, LARGEST = 8, 40, 32, 12, 4
#: A latent that has not fired for more steps (tokens) than this is dead, in the libraries' sense.
DEAD_AFTER = 5

IntArray = npt.NDArray[np.int64]


class Counted(NamedTuple):
    """What a library and Neuronscope counted of the same run, each int64 ``(N,)``.

    Attributes:
        fired: Tokens at which each latent fired.
        steps: Steps since it last fired; ``None`` where the library keeps no such number.
        tokens: Tokens since then; ``None`` likewise.
        dead: Which latents it calls dead.
    """

    fired: IntArray
    steps: IntArray | None
    tokens: IntArray | None
    dead: npt.NDArray[np.bool_]


def batches() -> Iterator[Tensor]:
    """Yield random activations whose later features only come in the first steps, so that latents stop to fire."""
    draw = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        x = torch.randn(ROWS, INPUTS, generator=draw)
        yield x * (torch.arange(INPUTS) < max(2, INPUTS - step))


def ours(scope: ns.Scope, site: str, theirs: Counted) -> Counted:
    """Return Neuronscope's numbers in the library's terms."""
    tally = scope.census()[site]
    assert tally.kind == "sparse"
    assert tally.idle_positions is not None
    steps = STEPS - 1 - tally.last_active_step  # of a latent that never fired, −1, all of them
    return Counted(
        tally.positions - tally.zero_outputs,
        None if theirs.steps is None else steps,
        None if theirs.tokens is None else tally.idle_positions,
        steps > DEAD_AFTER if theirs.tokens is None else tally.idle_positions > DEAD_AFTER * ROWS,
    )


class _StandIn(ModuleType):
    """A module with any class, for packages that are imported and not used here."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(Loader, MetaPathFinder):
    """Finds a stand-in for each of some modules, and for whatever is inside it."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        stands_in = any(f"{fullname}.".startswith(f"{name}.") for name in self.names)
        return ModuleSpec(fullname, self, is_package=True) if stands_in else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Import with stand-ins for some modules that the tests do not need, and take them away again."""
    finder = _Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[name]


def _import_sae_lens() -> None:
    """Import SAELens with nothing of TransformerLens but the module class that its autoencoders inherit from."""
    if "sae_lens" in sys.modules:
        return
    inner = ("utils", "HookedTransformer", "ActivationCache", "components", "model_bridge")
    found = importlib.util.find_spec("transformer_lens")
    assert found is not None
    with without("datasets", "wandb", *(f"transformer_lens.{name}" for name in inner)):
        sys.modules["transformer_lens"] = lens = _StandIn("transformer_lens")
        lens.__path__ = [*(found.submodule_search_locations or ())]
        hooked, points = (
            importlib.import_module(f"transformer_lens.{name}") for name in ("HookedTransformer", "hook_points")
        )
        vars(hooked)["HookedRootModule"] = points.HookedRootModule
        importlib.import_module("sae_lens.training.sae_trainer")


def _silence_some(bias: Tensor) -> None:
    with torch.no_grad():
        bias[:3] = -50


def sae_lens(architecture: str) -> tuple[Counted, Counted]:
    """Train with the trainer of SAELens.

    Args:
        architecture: ``standard``, ``topk``, ``batchtopk``, ``jumprelu`` or ``gated``.
    """
    _import_sae_lens()
    from sae_lens import saes  # type: ignore[import-not-found,unused-ignore]
    from sae_lens.config import LoggingConfig, SAETrainerConfig  # type: ignore[import-not-found,unused-ignore]
    from sae_lens.training.sae_trainer import SAETrainer  # type: ignore[import-not-found,unused-ignore]

    name = {"standard": "Standard", "topk": "TopK", "batchtopk": "BatchTopK", "jumprelu": "JumpReLU", "gated": "Gated"}
    options: dict[str, Any] = {"k": LARGEST} if architecture.endswith("topk") else {}
    config = getattr(saes, f"{name[architecture]}TrainingSAEConfig")(d_in=INPUTS, d_sae=LATENTS, **options)
    torch.manual_seed(0)
    sae = getattr(saes, f"{name[architecture]}TrainingSAE")(config)
    _silence_some(sae.b_mag if architecture == "gated" else sae.b_enc)
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            n_checkpoints=0,
            checkpoint_path=None,
            save_final_checkpoint=False,
            total_training_samples=ROWS * STEPS,
            device="cpu",
            autocast=False,
            lr=1e-2,
            lr_end=1e-3,
            lr_scheduler_name="constant",
            lr_warm_up_steps=0,
            adam_beta1=0.9,
            adam_beta2=0.999,
            lr_decay_steps=0,
            n_restart_cycles=1,
            train_batch_size_samples=ROWS,
            dead_feature_window=DEAD_AFTER,
            feature_sampling_window=10_000,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=sae,
        data_provider=iter(()),
    )
    options = {"activations": {torch.nn.ReLU: "sparse"}} if architecture == "standard" else {}
    scope = ns.watch(sae, **options)
    for x in batches():
        scope.open_step(inputs=(x,))
        trainer.step(x)
        scope.close_step()
        scope.step()
    since = trainer.n_forward_passes_since_fired.numpy().astype(np.int64)
    theirs = Counted(trainer.act_freq_scores.numpy().astype(np.int64), since, None, trainer.dead_neurons.numpy())
    sites = {"topk": "topk", "batchtopk": "topk relu", "jumprelu": "jumprelu", "gated": "masked relu"}
    return theirs, ours(scope, f"W_enc/{sites.get(architecture, 'relu')}", theirs)


def dictionary_learning(architecture: str) -> tuple[Counted, Counted]:
    """Train with a trainer of dictionary_learning.

    Args:
        architecture: ``standard``, ``topk``, ``batchtopk``, ``jumprelu`` or ``gated``.
    """
    with without("nnsight"):
        from dictionary_learning import trainers  # type: ignore[import-not-found,unused-ignore]
    name = {
        "standard": "Standard",
        "topk": "TopK",
        "batchtopk": "BatchTopK",
        "jumprelu": "JumpRelu",
        "gated": "GatedSAE",
    }
    options: dict[str, Any] = {"k": LARGEST} if architecture.endswith("topk") else {}
    options |= {"lr": 1e-2, "warmup_steps": 0}
    if architecture not in ("topk", "batchtopk"):
        options["sparsity_warmup_steps"] = None
    trainer = getattr(trainers, f"{name[architecture]}Trainer")(
        steps=1000, activation_dim=INPUTS, dict_size=LATENTS, layer=0, lm_name="none", device="cpu", seed=0, **options
    )
    coder = trainer.ae
    bias = {"gated": "mag_bias", "jumprelu": "b_enc"}.get(architecture, "encoder.bias")
    _silence_some(coder.get_parameter(bias))
    if architecture == "jumprelu":
        with torch.no_grad():
            coder.threshold.fill_(0.3)  # stays above zero: below it, training keeps what `encode` cuts off
    keeps = hasattr(trainer, "num_tokens_since_fired")
    options = {"activations": {torch.nn.ReLU: "sparse", torch.nn.functional.relu: "sparse"}}
    scope = ns.watch(coder, **(options if architecture == "standard" else {}))
    fired, last = torch.zeros(LATENTS, dtype=torch.int64), torch.full((LATENTS,), -1)
    for step, x in enumerate(batches()):
        if not step and architecture.endswith("topk"):
            trainer.update(0, x)  # sets the decoder's bias, and starts to count anew below
            trainer.num_tokens_since_fired.zero_()
        with torch.no_grad(), scope.paused():
            latents = coder.encode(x, **({"use_threshold": False} if architecture == "batchtopk" else {}))
        fired += (latents != 0).sum(0)
        last[(latents != 0).any(0)] = step
        scope.open_step(inputs=(x,))
        trainer.update(step + 1, x)
        scope.close_step()
        scope.step()
    steps = (STEPS - 1 - last).numpy()
    tokens = trainer.num_tokens_since_fired.numpy() if keeps else None
    theirs = Counted(fired.numpy(), steps, tokens, steps > DEAD_AFTER if tokens is None else tokens > DEAD_AFTER * ROWS)
    sites = {
        "standard": "encoder/relu",
        "topk": "encoder/topk relu",
        "batchtopk": "encoder/topk relu",
        "jumprelu": "W_enc/jumprelu",
        "gated": "encoder/masked relu",
    }
    return theirs, ours(scope, sites[architecture], theirs)


def sparsify(architecture: str) -> tuple[Counted, Counted]:
    """Train a coder of eai-sparsify, with the bookkeeping of its trainer.

    It decodes from the picked latents alone, so that no tensor has all of them: they are put back into zeros.

    Args:
        architecture: ``topk`` or ``groupmax``.
    """
    with without("datasets"):
        from sparsify import SparseCoder, SparseCoderConfig  # type: ignore[import-not-found,unused-ignore]
    torch.manual_seed(0)
    coder = SparseCoder(INPUTS, SparseCoderConfig(num_latents=LATENTS, k=LARGEST, activation=architecture))
    _silence_some(coder.encoder.bias)
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-2)
    since, fired = torch.zeros(LATENTS, dtype=torch.int64), torch.zeros(LATENTS, dtype=torch.int64)
    scope = ns.watch(coder)
    for x in batches():
        found = coder(x)
        (found.fvu + found.auxk_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        zeros = torch.zeros(ROWS, LATENTS)
        scope.count("latents", zeros.scatter(-1, found.latent_indices, found.latent_acts.detach()))
        did_fire = torch.zeros(LATENTS, dtype=torch.bool)
        did_fire[found.latent_indices.flatten()] = True
        since += ROWS
        since[did_fire] = 0
        fired += torch.bincount(found.latent_indices.flatten(), minlength=LATENTS)
        scope.step()
    theirs = Counted(fired.numpy(), None, since.numpy(), since.numpy() > DEAD_AFTER * ROWS)
    return theirs, ours(scope, "latents", theirs)
