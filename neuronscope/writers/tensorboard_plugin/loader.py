"""Load the plugin for TensorBoard. An error while this is imported would keep TensorBoard from starting."""

from __future__ import annotations

from typing import Any

from tensorboard.plugins.base_plugin import TBLoader

__all__ = ["Loader"]


class Loader(TBLoader):  # type: ignore[misc]  # TensorBoard ships no types
    """Makes the plugin; named by the entry point ``tensorboard_plugins`` in ``pyproject.toml``."""

    def fix_flags(self, flags: Any) -> None:
        """Keep one report of each run and phase in memory: the newest, which holds the whole history."""
        flags.samples_per_plugin = {**(flags.samples_per_plugin or {}), "neuronscope": 1}

    def load(self, context: Any) -> Any:
        """Return the plugin."""
        from neuronscope.writers.tensorboard_plugin.plugin import Plugin

        return Plugin(context)
