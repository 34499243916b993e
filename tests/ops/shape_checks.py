"""A pytest plugin (`-p shape_checks`): the ops check the shapes in their signatures while the tests call them."""

import typing

# All but the ops before the switch below, which is meant for the ops alone.
import beartype  # noqa: F401
import torch._dynamo  # noqa: F401
from jaxtyping import install_import_hook

# Modules of Triton kernels stay outside: the hook would wrap kernels too, which then miss the names around them.
# The ops import their annotations for type checkers only, to need nothing but torch.
typing.TYPE_CHECKING = True
try:
    with install_import_hook("fff.ops", "beartype.beartype"):
        import fff.ops.balance
        import fff.ops.expert_mlp
        import fff.ops.expert_order
        import fff.ops.top_k_route
        import fff.ops.tree_route  # noqa: F401
finally:
    typing.TYPE_CHECKING = False
