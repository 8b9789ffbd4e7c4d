"""Swapping a module's class in place.

The class of a module becomes a subclass of its own class with another ``forward``. Parameters,
hooks, buffers, the state dict and what ``isinstance`` says stay, nothing is copied, and no other
module of the original class notices.
"""

import functools


class Unfit(Exception):
    """A module that a class cannot be swapped for; the message says why."""


class Swapped:
    """Base of the classes that modules are swapped to; put first, before the original class.

    Attributes:
        backend: of the ops; None: as `pyllm.ops.registry` chooses.
    """

    backend = None

    @classmethod
    def settings(cls, module) -> dict:
        """Attributes that `module` gets with the class, found out once.

        Raises:
            Unfit: if this class cannot take the module's place.
        """
        return {}

    def _get_name(self):
        return f"pyllm.{type(self).__name__}"

    def __reduce_ex__(self, protocol):
        # The class was made at run time: a copy or an unpickled module has it made again.
        _, _, *state = super().__reduce_ex__(protocol)
        return _rebuild, (type(self).mixin, type(self).original), *state


@functools.cache
def swapped(mixin: type[Swapped], original: type) -> type:
    """The subclass of `original` that does what `mixin` does."""
    names = {"mixin": mixin, "original": original, "__module__": mixin.__module__}
    return type(original.__name__, (mixin, original), names)


def original_class(module) -> type:
    """The class that a module had before it was swapped, if it was."""
    return getattr(type(module), "original", type(module))


def _rebuild(mixin, original):
    cls = swapped(mixin, original)
    return cls.__new__(cls)
