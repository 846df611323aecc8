"""What tells the code of a user's own function or module from an earlier version of it, as one hash.

Taking equal things for different costs a computation; taking different ones for equal gives wrong features. So all that code
reads is looked at: constants, closures, defaults, globals, attributes; and where a value has nothing to compare, the hash is
one of a kind.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import pathlib
import re
import sys
import sysconfig
import types
import uuid
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from typing import Any

import numpy as np

from .._logging import logger

__all__ = ["hash_code"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice, Enum, np.generic, np.dtype)
_PLAIN_OF_TORCH = ("torch.dtype", "torch.device", "torch.Size", "torch.memory_format")
_NAMED = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, np.ufunc)
_LIBRARY = sysconfig.get_path("stdlib")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def hash_code(thing: Callable[..., Any]) -> str:
    """SHA-256 of what a function, an object that is called, or a torch module does.

    Code of installed packages counts by its name. Equal hashes mean equal code and values in any session of one version of
    Python; what cannot be compared gives another hash each time, which the log says.
    """
    code = _Code()
    try:
        code.add(thing)
    except RuntimeError:  # too deep, or a tensor without values
        code.add_unknown(thing)
    return code.digest.hexdigest()


class _Code:
    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # by identity, kept alive so that no other takes their place

    def say(self, *words: object) -> None:
        self.digest.update(f"{words!r};".encode())

    def add_unknown(self, thing: Any) -> None:
        kind = type(thing).__qualname__
        logger.warning("features of an encoder of your own are not reused: its code depends on a %s", kind)
        self.say(kind, uuid.uuid4().hex)

    def add(self, thing: Any) -> None:
        """Any value that code can depend on."""
        kind = type(thing)
        self.say(kind.__module__, kind.__qualname__)
        if isinstance(thing, (*_PLAIN, pathlib.PurePath)) or f"{kind.__module__}.{kind.__name__}" in _PLAIN_OF_TORCH:
            self.say(repr(thing))
        elif isinstance(thing, types.ModuleType) or _is_of_package(thing):
            self.say(getattr(thing, "__module__", ""), thing.__name__)
        elif isinstance(thing, _NAMED):
            self.say(thing.__name__)
            self.add(getattr(thing, "__self__", None))
        elif isinstance(thing, (tuple, frozenset, types.CodeType)):  # equal ones may or may not be one object
            self._add_compound(thing)
        elif id(thing) in self._seen:
            self.say(self._seen[id(thing)][0])
        else:
            self._seen[id(thing)] = len(self._seen), thing
            self._add_compound(thing)

    def _add_compound(self, thing: Any) -> None:
        torch = sys.modules.get("torch")  # not imported to tell that something is not of it
        if isinstance(thing, types.CodeType):
            self._add_bytecode(thing)
        elif isinstance(thing, types.FunctionType):
            self._add_function(thing)
        elif isinstance(thing, types.MethodType):
            self._add_all([thing.__func__, thing.__self__])
        elif isinstance(thing, functools.partial):
            self._add_all([thing.func, thing.args, thing.keywords])
        elif isinstance(thing, type):
            self._add_class(thing)
        elif isinstance(thing, (list, tuple)):
            self._add_all(thing)
        elif isinstance(thing, (set, frozenset)):
            self._add_all(sorted(map(hash_code, thing)))  # their order is another one in each session
        elif isinstance(thing, Mapping):
            self._add_all([*thing.keys(), *thing.values()])
        elif isinstance(thing, (staticmethod, classmethod)):
            self.add(thing.__func__)
        elif isinstance(thing, property):
            self._add_all([thing.fget])
        elif isinstance(thing, re.Pattern):
            self._add_all([thing.pattern, thing.flags])
        elif isinstance(thing, np.ndarray):
            self._add_array(thing)
        elif torch is not None and isinstance(thing, torch.Tensor):
            self.say(str(thing.dtype), tuple(thing.shape))
            self.digest.update(thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        elif torch is not None and isinstance(thing, torch.nn.Module):
            self._add_module(thing, torch)
        elif hasattr(thing, "__dict__") or copyreg._slotnames(type(thing)):  # type: ignore[attr-defined]
            slots = {name: getattr(thing, name, None) for name in copyreg._slotnames(type(thing))}  # type: ignore[attr-defined]
            self._add_all([type(thing), getattr(thing, "__dict__", {}), slots])
        elif type(thing) is not object:
            self.add_unknown(thing)

    def _add_all(self, things: Iterable[Any]) -> None:
        things = list(things)
        self.say(len(things))
        for thing in things:
            self.add(thing)

    def _add_bytecode(self, code: types.CodeType) -> None:
        self.say(code.co_code, code.co_exceptiontable, code.co_names, code.co_argcount, code.co_flags)
        self._add_all(code.co_consts)

    def _add_function(self, function: types.FunctionType) -> None:
        self._add_all([function.__defaults__, function.__kwdefaults__])
        self._add_all(cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell))
        if _is_installed(function.__code__.co_filename):  # what a decorator makes: the user's function is around it
            self.say(function.__code__.co_qualname)
            return
        self.add(function.__code__)
        names = sorted(_globals_of(function.__code__) & function.__globals__.keys())
        self._add_all([names, *(function.__globals__[name] for name in names)])

    def _add_class(self, kind: type) -> None:
        """Its own attributes and methods, and those of the classes it inherits from."""
        self.say(kind.__module__, kind.__qualname__)
        own = {name: value for name, value in vars(kind).items() if not _is_of_every_class(name, value)}
        self._add_all([list(own), *own.values(), *kind.__bases__])

    def _add_array(self, array: np.ndarray) -> None:
        self.say(array.dtype.str, array.shape)
        if array.dtype.hasobject:
            self._add_all(array.ravel().tolist())
        else:
            self.digest.update(array.tobytes())

    def _add_module(self, module: Any, torch: Any) -> None:
        """Code, tensors, modules in it, hooks, and what else its class keeps: more than the module's text shows."""
        if isinstance(module, torch.jit.ScriptModule):
            self.say([(name, getattr(part, "code", "")) for name, part in module.named_modules()])
            self._add_all([dict(module.named_buffers()), dict(module.named_parameters())])
            return
        known = vars(torch.nn.Module()).keys()
        own = {name: value for name, value in vars(module).items() if name not in known}
        parts = [module._parameters, module._buffers, module._modules]
        hooks = [list(vars(module).get(kind, {}).values()) for kind in _HOOKS]
        self._add_all([type(module), *map(dict, parts), hooks, own])


def _is_installed(file: str) -> bool:
    return file.startswith((_LIBRARY, "<frozen")) or "site-packages" in file or "dist-packages" in file


def _is_of_package(thing: Any) -> bool:
    """Whether it is a function, class or the like that an installed package has by this name."""
    name, module = getattr(thing, "__name__", None), getattr(thing, "__module__", None)
    if not isinstance(name, str) or not isinstance(module, str) or module == "__main__":
        return False
    found = sys.modules.get(module)
    file = getattr(found, "__file__", None)  # none of those that Python has built in
    return found is not None and getattr(found, name, None) is thing and (file is None or _is_installed(file))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # empty until a name that is used earlier is given its value
    except ValueError:
        return False
    return True


def _globals_of(code: types.CodeType) -> set[str]:
    """Names that code, or code within it, looks up in its module."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return names.union(*(_globals_of(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _is_of_every_class(name: str, value: Any) -> bool:
    """What Python adds to a class, and does not act on its instances."""
    if name in ("__module__", "__doc__", "__annotations__", "__static_attributes__", "__firstlineno__", "_abc_impl"):
        return True
    return isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType))
