"""What a user may ask of fetched models and data: from which hub or directory, what of it, and where it lies."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from inventory.base import NODE_NAME, AbsolutePath, ControlPath, Spec, Strict, Version
from inventory.cluster import Cluster
from roles.environment.spec import Declared as Environment
from roles.environment.spec import Environments
from roles.storage.spec import storage_path, synced_at

HUB = "https://huggingface.co"
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
REVISION = re.compile(r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
COMMIT = re.compile(r"[0-9a-f]{40}")
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,99}")
PATTERN = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


def _repository(text: str) -> str:
    if not REPOSITORY.fullmatch(text):
        raise ValueError(f"{text!r} is no name on a hub: write OWNER/NAME, without an address")
    return text


def _revision(text: str) -> str:
    if not REVISION.fullmatch(text):
        raise ValueError(f"{text!r} is no revision: give a commit, a tag or a branch")
    return text


def _address(text: str) -> str:
    if re.search(r"//[^/]*@", text):
        raise ValueError(
            "must not hold a password, which would reach logs and command lines: leave it out, and set "
            "HTTPS_PROXY where it is fetched, or name a token"
        )
    if not re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+(/[A-Za-z0-9._/-]*)?", text):
        raise ValueError(f"{text!r} is no address: write http:// or https://, a host and a port")
    return text.rstrip("/")


def _pattern(text: str) -> str:
    if not PATTERN.fullmatch(text):
        raise ValueError(f"{text!r} is no pattern of file names, such as '*.safetensors'")
    return text


def _whereabouts(text: str) -> str:
    if re.search(r"hf_[A-Za-z0-9]{16}", text):
        raise ValueError("must name where the token is; the token itself never stands here")
    return text


def _variable(text: str) -> str:
    if not VARIABLE.fullmatch(text):
        raise ValueError(
            "is no name of an environment variable; the token itself never stands here"
        )
    return text


Pattern = Annotated[str, AfterValidator(_pattern)]
Repository = Annotated[str, AfterValidator(_repository)]
Address = Annotated[str, AfterValidator(_address)]


class Token(Strict):
    """Where the token is, on the machine that fetches; it is read when something is fetched, and never shown.

    file: of mode 0600, the token in its first line. variable: of the environment that Lockstep runs in.
    """

    file: Annotated[str, Field(min_length=1), AfterValidator(_whereabouts)] | None = None
    variable: Annotated[str, AfterValidator(_variable), AfterValidator(_whereabouts)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _no_secret(cls, values: object) -> object:
        if isinstance(values, str):  # which the usual sentence would show
            raise ValueError(
                "must be {file: …} or {variable: …}; the token itself never stands here"
            )
        return values

    @model_validator(mode="after")
    def _one(self) -> Token:
        if (self.file is None) == (self.variable is None):
            raise ValueError("give one of 'file' and 'variable'")
        return self


class Wanted(Strict):
    """One model or data set.

    model, dataset: its name on the hub; or directory: where its files lie on the control machine.
    revision: a commit, tag or branch. What is no commit is resolved once, when it is first fetched.
    include, exclude: patterns of the paths in it; one that matches what is excluded wins.
    path: where it lies for all nodes; None means ``models/NAME`` or ``data/NAME`` on the shared storage.
    endpoint: a mirror, in place of huggingface.co. proxy: through which the hub is reached.
    token: for what is private or gated.
    on: who fetches it; the control machine, which sends it to the head, or the head itself.
    environment: whose huggingface_hub the head uses; None means the only one.
    """

    model: Repository | None = None
    dataset: Repository | None = None
    directory: ControlPath | None = None
    revision: Annotated[Version, AfterValidator(_revision)] = "main"
    include: list[Pattern] = []
    exclude: list[Pattern] = []
    path: AbsolutePath | None = None
    endpoint: Address | None = None
    proxy: Address | None = None
    token: Token | None = None
    on: Literal["control", "head"] = "control"
    environment: str | None = None

    @model_validator(mode="after")
    def _no_contradictions(self) -> Wanted:
        if sum(each is not None for each in (self.model, self.dataset, self.directory)) != 1:
            raise ValueError("give one of 'model', 'dataset' and 'directory'")
        said = self.model_fields_set
        if self.directory is not None:
            hubs = sorted(said & {"revision", "endpoint", "proxy", "token", "on", "environment"})
            if hubs:
                raise ValueError(f"a directory is asked of no hub: leave {', '.join(hubs)} out")
            if self.path is None:
                raise ValueError("a directory needs 'path', where it lies for all nodes")
        if self.on == "control" and self.environment is not None:
            raise ValueError("'environment' counts for on: head alone")
        if self.on == "head" and self.token is not None and self.token.file is None:
            raise ValueError(
                "on: head needs token: {file: …}, a file there of mode 0600: the head has not the "
                "variables of this machine"
            )
        if self.token and self.token.file and self.on == "head" and self.token.file[0] != "/":
            raise ValueError("on: head needs the absolute path of the token's file on the head")
        return self


@dataclass(frozen=True)
class Declared:
    """One of them, with its name and what follows from it.

    path: on the nodes. source: what it is, in words: ``model OWNER/NAME``, ``data set …``, ``directory``.
    """

    name: str
    spec: Wanted
    path: str

    @property
    def source(self) -> str:
        if self.spec.model is not None:
            return f"model {self.spec.model}"
        return f"data set {self.spec.dataset}" if self.spec.dataset is not None else "directory"

    @property
    def arriving(self) -> str:
        """Where it grows on the head, beside its place."""
        place = PurePosixPath(self.path)
        return f"{place.parent}/.{place.name}.fetching"


class FetchSpec(Spec):
    """The section ``fetch``: a map from names to models and data sets, beside the key ``manage``."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Wanted]

    @model_validator(mode="after")
    def _names(self) -> FetchSpec:
        for name in self.__pydantic_extra__:
            if not NODE_NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no name for what is fetched: use lower-case letters, digits and hyphens"
                )
        return self

    def each(self, cluster: Cluster) -> list[Declared]:
        """All of them, in the order of the file."""
        storage = storage_path(cluster) or ""
        return [
            Declared(name, one, one.path or f"{storage}/{'models' if one.model else 'data'}/{name}")
            for name, one in self.__pydantic_extra__.items()
        ]

    def problems(self, cluster: Cluster) -> Iterable[tuple[str, str]]:
        """Each lies on the storage, in a directory of its own."""
        storage = storage_path(cluster)
        if storage is None:
            yield "", "what is fetched lies on the nodes' storage: declare storage"
            return
        lockstep = f"{storage}/.lockstep"
        before: list[Declared] = []
        for one in self.each(cluster):
            place = PurePosixPath(one.path)
            if not place.is_relative_to(storage) or one.path == storage:
                yield f"{one.name}.path", f"{one.path} is no directory below the storage {storage}"
            elif place.is_relative_to(lockstep):
                yield f"{one.name}.path", f"{lockstep} is Lockstep's own: choose another directory"
            elif synced := synced_at(cluster, one.path):
                yield (
                    f"{one.name}.path",
                    f"{one.path} overlaps {synced}, which storage.sync brings there",
                )
            for other in before:
                if place.is_relative_to(other.path) or PurePosixPath(other.path).is_relative_to(
                    place
                ):
                    yield (
                        f"{one.name}.path",
                        f"{one.path} overlaps {other.name}: choose another one",
                    )
            if one.spec.on == "head":
                sentence = _of_environment(cluster, one)
                if sentence:
                    yield f"{one.name}.on", sentence
            before.append(one)


def _of_environment(cluster: Cluster, one: Declared) -> str | None:
    """Why no environment can fetch it on the head; None where one can."""
    if environment_of(cluster, one) is not None:
        return None
    if one.spec.environment is not None:
        return f"there is no environment {one.spec.environment}: name one of 'environments'"
    return "the head fetches with an environment's huggingface_hub: name it with 'environment', or say on: control"


def environment_of(cluster: Cluster, one: Declared) -> Environment | None:
    """The environment whose huggingface_hub the head uses."""
    section = cluster.section("environments", Environments)
    known = {each.name: each for each in section.each()} if section else {}
    if one.spec.environment is not None:
        return known.get(one.spec.environment)
    return next(iter(known.values())) if len(known) == 1 else None
