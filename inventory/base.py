"""The strict base that every declared thing shares, and the small types of the cluster file.

Roles take their specs from here too. Nothing in this module reads a file or reaches a node.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

if TYPE_CHECKING:
    from inventory.cluster import Cluster

NODE_NAME = re.compile(r"[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?")
USER_NAME = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
GPU_CLASS = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,30}[a-z0-9])?")
INTERFACE = re.compile(r"(?!\.{1,2}\Z)[^\s/:\x00-\x1f\x7f]{1,15}")
WORDS_OF_YAML = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "none", "nan", "inf"}
WORDS_OF_LOCKSTEP = {"all", "inventory", "localhost", "head", "workers"}

Manage = Literal["managed", "check", "unmanaged"]
"""managed: looked at and converged · check: looked at, never changed · unmanaged: left alone."""


class Strict(BaseModel):
    """A piece of the cluster file: unknown keys are refused and values do not change later.

    Strict about types, but a field may be a path or a tuple, which a file can only write as text or as
    a list.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _from_file(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: _as_declared(fields[key].annotation, value) if key in fields else value
            for key, value in values.items()
        }


def _as_declared(annotation: Any, value: Any) -> Any:
    """A file's text or list as the path or tuple that the annotation asks for; else unchanged."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _as_declared(inner[0], value)
    if origin in (Union, UnionType):
        candidates = (_as_declared(member, value) for member in inner)
        return next((found for found in candidates if found is not value), value)
    if isinstance(value, str) and value and annotation in (Path, PurePosixPath):
        return annotation(value)
    if isinstance(value, list) and origin is tuple:
        kinds = [inner[0]] * len(value) if inner[1:] == (...,) else [*inner, *[Any] * len(value)]
        return tuple(_as_declared(kind, item) for kind, item in zip(kinds, value, strict=False))
    if isinstance(value, list) and origin is list:
        return [_as_declared(inner[0], item) for item in value]
    if isinstance(value, dict) and origin in (dict, Mapping):
        return {key: _as_declared(inner[1], item) for key, item in value.items()}
    return value


class Spec(Strict):
    """What a user may ask of one role; each role's ``spec.py`` derives its own."""

    manage: Manage = "managed"

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """What contradicts other settings: a key path below the section, and a sentence.

        Asked once the whole file is valid. A path such as ``pins.torch`` or ``install[2]`` gives the
        finding its line; an empty one means the section itself.
        """
        return ()


def _name(text: str) -> str:
    if not NODE_NAME.fullmatch(text):
        raise ValueError(
            f"{text!r} is no host name: begin with a lower-case letter, go on with lower-case "
            "letters, digits and hyphens, end without a hyphen, at most 63 in all"
        )
    if text in WORDS_OF_YAML | WORDS_OF_LOCKSTEP:
        raise ValueError(
            f"{text!r} means something else to YAML or to Lockstep: choose another name"
        )
    return text


def _user(text: str) -> str:
    if not USER_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no user name")
    return text


def _address(text: str) -> str:
    advice = "give the address that the other nodes use"
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        if "/" in text:
            advice = "leave the prefix length out"
        raise ValueError(f"{text!r} is no IP address: {advice}") from None
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or address
    if address.is_link_local:
        raise ValueError(f"{text} is link-local, valid on one cable only: {advice}")
    network = isinstance(address, ipaddress.IPv4Address) and not int(address) >> 24
    scope = getattr(address, "scope_id", None)
    if network or scope or address.is_unspecified or address.is_multicast:
        raise ValueError(f"{text} cannot be a node's address: {advice}")
    if isinstance(address, ipaddress.IPv4Address) and address.is_reserved:
        raise ValueError(f"{text} is reserved and cannot be a node's address: {advice}")
    return str(address)


def _gpu_class(text: str) -> str:
    if not GPU_CLASS.fullmatch(text):
        raise ValueError(f"{text!r} is no GPU class: use lower-case letters, digits and hyphens")
    return text


def _interface(text: str) -> str:
    if not INTERFACE.fullmatch(text):
        raise ValueError(
            f"{text!r} is no interface name: at most 15 characters, without spaces, '/' and ':'"
        )
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/") or re.search(r"[\x00-\x1f]", text) or "/../" in f"{text}/":
        raise ValueError(f"{text!r} is no absolute path")
    return text.rstrip("/") or "/"


def _path(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and value else value


def _text_of_scalar(value: Any) -> Any:
    """YAML reads ``3.20`` as a float and loses the zero; versions must be quoted, and the message says so."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        # The loader puts the number into the sentence as the file has it.
        raise PydanticCustomError("unquoted", "must be quoted, so that YAML keeps it as written")
    return value


NodeName = Annotated[str, AfterValidator(_name)]
UserName = Annotated[str, AfterValidator(_user)]
Address = Annotated[str, AfterValidator(_address)]
Port = Annotated[int, Field(ge=1, le=65535)]
AbsolutePath = Annotated[str, AfterValidator(_absolute)]
"""A path on the nodes."""
ControlPath = Annotated[Path, BeforeValidator(_path)]
"""A path on the control machine; a relative one counts from the cluster file's folder."""
Version = Annotated[str, BeforeValidator(_text_of_scalar), WithJsonSchema({"type": "string"})]
GpuClass = Annotated[str, AfterValidator(_gpu_class)]
InterfaceName = Annotated[str, AfterValidator(_interface)]
