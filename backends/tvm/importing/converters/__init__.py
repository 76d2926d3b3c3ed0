"""Operators -> Relax, where TVM's stock converter is missing, silently wrong, or slower than a kernel of ours.

One module per family; importing this package fills the tables of ``registry``. Everything here is checked against eager by the
operator sweep (``tests/backends/tvm/importing/test_operator_sweep.py``).
"""

from thresher.backends.tvm.importing.converters import (  # noqa: F401  (each fills the tables)
    activations,
    arithmetic,
    attention,
    complex_numbers,
    convolutions,
    elementwise,
    experts,
    extrema,
    movement,
    norms,
    patches,
    pools,
    prims,
    products,
    reductions,
    scans,
    scatter,
    selection,
    sparse_linear,
    stock_convolutions,
    thresholds,
    tokens,
)
from thresher.backends.tvm.importing.converters.registry import converter_of

__all__ = ["converter_of"]
