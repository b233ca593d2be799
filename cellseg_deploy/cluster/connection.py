"""Connect to a Dask cluster, or start one on this machine; the only module that knows Dask's addresses and errors."""

from __future__ import annotations

import ipaddress
import logging
import re
import ssl
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellseg_deploy.errors import BackendUnavailableError, UsageError
from cellseg_deploy.outputs.requirements import require_packages

LOCAL = "local"
CONNECT_SECONDS = 30
TRIES = 2
"""Workers of a local cluster that an image may end while other images run, and again when it is alone."""

# Ctrl-C reaches all processes of a terminal; this one ends the workers once it has written what is done.
_IGNORE_INTERRUPTS = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
_ADDRESS = re.compile(r"(tcp|tls)://(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})")
_MUST_BE_EQUAL = ("python", "dask", "distributed", "msgpack", "cloudpickle")


@dataclass(frozen=True)
class TlsFiles:
    """Certificate authority, own certificate and its key, as PEM files; None: as Dask is configured."""

    ca_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


def check_address(address: str) -> None:
    """Raise ``UsageError`` unless ``address`` is ``local``, or one that can be used safely.

    Whoever reaches a scheduler can run code on its workers, so without TLS only the loopback device is accepted.
    """
    if address == LOCAL:
        return
    if not (found := _ADDRESS.fullmatch(address)):
        raise UsageError(
            f"the address of a scheduler must be local, tcp://HOST:PORT or tls://HOST:PORT, got {address!r}"
        )
    if found[1] == "tcp" and not _is_loopback(found[2].strip("[]")):
        raise UsageError(
            f"{address} is not encrypted, so anybody on that network could run code on the workers; expected tls:// "
            "(tcp:// only for this machine's own 127.0.0.1)"
        )


@contextmanager
def connected(address: str, *, workers: int, threads_per_worker: int, tls: TlsFiles) -> Iterator[Any]:
    """Yield a Dask client of the cluster at ``address``; ``local`` starts ``workers`` processes with
    ``threads_per_worker`` threads each, and ends them afterwards.

    Raises ``UsageError`` for a wrong address or certificate file, ``BackendUnavailableError`` if the cluster does not
    answer, or has other versions of Python or Dask.
    """
    require_packages("cluster", "distributed")
    check_address(address)
    import dask
    from distributed import Client, LocalCluster

    with ExitStack() as stack:
        logging.getLogger("distributed").setLevel(logging.CRITICAL)  # what matters is raised or said by the run
        if address == LOCAL:
            # Dask gives up a worker that is not back 15 s after its death: a busy machine takes longer to start one.
            stack.enter_context(dask.config.set({"distributed.deploy.lost-worker-timeout": "600s"}))
            cluster = LocalCluster(
                n_workers=workers,
                threads_per_worker=threads_per_worker,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # any free port: Dask serves its state over HTTP in any case
                silence_logs=logging.CRITICAL,
                scheduler_kwargs={"allowed_failures": TRIES - 1, "dashboard": False},
                preload=_IGNORE_INTERRUPTS,
            )
            stack.enter_context(cluster)
            client = stack.enter_context(Client(cluster, set_as_default=False))
        else:
            security = _security(tls) if address.startswith("tls") else None
            client = stack.enter_context(_client(address, security))
        _check_versions(client, address)
        yield client


def _client(address: str, security: Any) -> Any:
    from distributed import Client

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other versions: see ``_check_versions``
            return Client(address, security=security, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise BackendUnavailableError(_why(address, error)) from error


def _why(address: str, error: BaseException) -> str:
    """Return one sentence on why there is no connection to ``address``."""
    causes = list[str]()
    each: BaseException | None = error
    while each is not None:
        if isinstance(each, ssl.SSLCertVerificationError):
            return (
                f"{address}: its certificate was refused ({each.verify_message}); expected one that is valid now and "
                "signed by the authority in `tls_ca_file`"
            )
        causes.append(str(each))
        each = each.__cause__ or each.__context__
    said = " ".join(causes)
    if "expired" in said:
        return f"{address}: the scheduler refused this machine's certificate as expired; renew the file `tls_cert`"
    if "Timed out" in said or "refused" in said or "not known" in said:
        return f"{address}: no scheduler answers there; check host and port, and that dask-scheduler runs"
    if address.startswith("tls"):
        return f"{address}: no TLS connection ({causes[0] or causes[-1]}); check that the scheduler uses TLS too"
    return f"{address}: no connection ({causes[0]}); check that it is the address of a Dask scheduler"


def _security(tls: TlsFiles) -> Any:
    """Return Dask's settings of TLS. Raises ``UsageError`` for a file that is missing or no certificate."""
    from distributed.security import Security

    names = {"tls_ca_file": tls.ca_file, "tls_client_cert": tls.certificate, "tls_client_key": tls.key}
    given = {name: str(path) for name, path in names.items() if path is not None}
    for path in given.values():
        if not Path(path).is_file():
            raise UsageError(f"{path}: no such file; expected a certificate or key in PEM format")
    security = Security(require_encryption=True, **given)
    if missing := [name for name in names if getattr(security, name) is None]:
        options = {"tls_ca_file": "`tls_ca_file`", "tls_client_cert": "`tls_cert`", "tls_client_key": "`tls_key`"}
        raise UsageError(
            f"tls:// needs {', '.join(options[name] for name in missing)}, or these in Dask's configuration"
        )
    try:
        security.get_connection_args("client")
    except (OSError, ValueError) as error:
        raise UsageError(f"the files for TLS cannot be used ({error}); expected certificate and key in PEM") from error
    return security


def _check_versions(client: Any, address: str) -> None:
    """Raise ``BackendUnavailableError`` if scheduler or a worker has another Python or Dask than this process."""
    try:
        versions = client.get_versions(check=False)
    except Exception as error:
        raise BackendUnavailableError(_why(address, error)) from error
    own = _packages(versions["client"])
    others = {
        "the scheduler": versions["scheduler"],
        **{f"worker {at}": one for at, one in versions["workers"].items()},
    }
    for who, packages in others.items():
        theirs = _packages(packages)
        for name in _MUST_BE_EQUAL:
            if name in theirs and theirs[name] != own[name]:
                raise BackendUnavailableError(
                    f"{address}: {who} has {name} {theirs[name]}, this machine {own[name]}; install the same versions "
                    "on all machines"
                )


def _packages(versions: Any) -> dict[str, str]:
    packages = dict(versions["packages"])
    packages["python"] = ".".join(str(packages["python"]).split(".")[:2])
    return packages


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
