"""What every test that compiles is marked with: slow, a fresh compiler, and none of the compiler's own warnings."""

from __future__ import annotations

import pytest

WARNINGS = [
    # The compiler warns of its deprecations and of this machine's limits.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    # And it looks at the .grad of a hook's arguments, with a warning that it hides itself where warnings are no errors.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"),
]
#: With the fixture of ``tests/conftest.py``.
COMPILES = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler"), *WARNINGS]
