"""Models and data sets in the bundle: fetched from their hub, or copied from a directory, with their hashes."""

from __future__ import annotations

from collections.abc import Callable

from deploy.bundle.store import BundleError, Store
from inventory.cluster import Cluster
from roles.core.here import run_here
from roles.core.session import NodeFailed
from roles.fetch.converge import asked, pinned, program
from roles.fetch.hub import MANIFEST, STAMP, manifest, stamp_of
from roles.fetch.spec import Declared


def place(name: str) -> str:
    """The directory of that model or data set in the bundle."""
    return f"models/{name}/files"


def gather(store: Store, cluster: Cluster, one: Declared, say: Callable[[str], None]) -> None:
    """Have its files, its manifest and its stamp there. A branch stays at the commit of the last bundle.

    Raises BundleError.
    """
    folder = store.folder / "models" / one.name
    files = store.folder / place(one.name)
    request = asked(cluster, one, str(folder), pinned(one, stamp_of(files)))
    try:
        run_here(program(request), say)
    except NodeFailed as error:
        raise BundleError(str(error)) from None
    for path, file in manifest(files / MANIFEST).items():
        name = f"{place(one.name)}/{path}"
        if one.spec.directory is not None:
            store.copy(cluster.at_hand(one.spec.directory) / path, name)
        else:
            store.keep(name, file.sha256)
    for own in (MANIFEST, STAMP):
        store.keep(f"{place(one.name)}/{own}")
