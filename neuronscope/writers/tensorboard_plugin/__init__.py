"""Show reports in a tab of TensorBoard: a thin frame around the page that ``report.to_html()`` writes.

TensorBoard finds :class:`~neuronscope.writers.tensorboard_plugin.loader.Loader` by an entry point of this package and
imports it at every start, so its module loads nothing heavy, and never torch.
"""
