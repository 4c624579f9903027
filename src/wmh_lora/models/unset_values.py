"""Building modules without their starting values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["unset_values"]

_FILLS = frozenset({Tensor.uniform_, Tensor.normal_})


class _SkipInitialisation(TorchFunctionMode):
    """Leaves tensors as they were allocated where initialisation would fill them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLS or getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


@contextmanager
def unset_values() -> Iterator[None]:
    """Build modules in this context without drawing their starting values.

    For modules whose values all come from elsewhere, or of which only the shapes count: random
    numbers for the 90 million parameters of ViT-B take a second. (The meta device would do as well,
    but loads a part of torch's compiler.)

    Examples
    --------
    >>> import torch
    >>> state = torch.random.get_rng_state()
    >>> with unset_values():
    ...     layer = torch.nn.Linear(2, 3)
    >>> torch.equal(state, torch.random.get_rng_state())
    True
    """
    with _SkipInitialisation():
        yield
