"""What every message is: a class with a tag, whose annotations are its fields."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, make_dataclass
from typing import Any, ClassVar, NoReturn, dataclass_transform


@dataclass_transform(frozen_default=True)
class _MessageType(type):
    """Makes the annotations of a class its slots, as ``dataclass(slots=True)`` does, without code for each class.

    Every process imports all messages when it starts, and clients wait for a supervisor that takes over: a hundred
    dataclasses cost more than half of that import."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, tag: int = 0, descriptors: int = 0
    ) -> Any:
        names = tuple(namespace.get("__annotations__", ())) if bases else ()
        namespace |= {"TAG": tag, "DESCRIPTORS": descriptors, "__slots__": names, "__match_args__": names}
        return super().__new__(cls, name, bases, namespace)


class _DataclassFields:
    """``__dataclass_fields__`` of a message, for ``dataclasses.replace`` and ``fields``; made when it is read."""

    def __get__(self, message: object, kind: type) -> dict[str, Any]:
        made: Any = make_dataclass(kind.__name__, kind.__annotations__.items())
        return dict(made.__dataclass_fields__)


class Message(metaclass=_MessageType):
    """Base of all messages, which are like frozen dataclasses: ``TAG`` is the number on the wire, ``DESCRIPTORS`` the
    most that may travel with it."""

    TAG: ClassVar[int]
    DESCRIPTORS: ClassVar[int]
    __match_args__: ClassVar[tuple[str, ...]]
    __dataclass_fields__: ClassVar[Any] = _DataclassFields()

    def __init__(self, *values: object, **named: object) -> None:
        """The first message of a class generates its ``__init__``."""
        kind, names = type(self), self.__match_args__
        stores = {f"set_{name}": getattr(kind, name).__set__ for name in names}
        lines = "; ".join(f"set_{name}(self, {name})" for name in names) or "pass"
        exec(f"def __init__({', '.join(('self', *names))}): {lines}", stores)
        kind.__init__ = stores["__init__"]  # type: ignore[method-assign]
        kind.__init__(self, *values, **named)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise FrozenInstanceError(f"cannot assign to field {name!r}")

    def __delattr__(self, name: str) -> NoReturn:
        raise FrozenInstanceError(f"cannot delete field {name!r}")

    def _values(self) -> tuple[object, ...]:
        return tuple([getattr(self, name) for name in self.__match_args__])

    def __repr__(self) -> str:
        pairs = zip(self.__match_args__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in pairs)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and type(other) is type(self) and other._values() == self._values()

    def __hash__(self) -> int:
        return hash((type(self), *self._values()))
