"""Which URLs may be asked for, and at which addresses: one parser, one resolution, and a last look at the socket."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str], Awaitable[Sequence[str]]]
"""The addresses of a name. Raises OSError."""

_URL_CHARACTERS = 2048
_URL = re.compile(r"(https?)://([^/?#]+)([/?#].*)?", re.ASCII | re.IGNORECASE | re.DOTALL)
_PRINTABLE = re.compile(r"[!-~]+", re.ASCII)
_NAME = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*", re.ASCII)
# Whoever reads a last label like these as a number reads the name as an IPv4 address (WHATWG URL, "ends in a number").
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)
_DOTTED = re.compile(r"(0|[1-9][0-9]{0,2})(\.(0|[1-9][0-9]{0,2})){3}", re.ASCII)
_INSIDE = ("localhost", "local", "internal", "intranet", "lan", "home", "corp", "private", "arpa", "onion", "test")

# IANA's special-purpose registries, and the metadata services that clouds put at public addresses.
_DENIED_4 = tuple(
    map(
        ipaddress.IPv4Network,
        ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
         "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24",
         "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32"),
    )
)  # fmt: skip
# Of IPv6, only what is global unicast; without the tunnels (Teredo, 6to4), whose inner address nobody checks.
_PUBLIC_6 = ipaddress.IPv6Network("2000::/3")
_DENIED_6 = tuple(
    map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20"))
)


class Denied(Exception):
    """The guard does not let a request through; the text says why."""


def is_public(address: Address) -> bool:
    """Whether the address is of the public internet: no private, local, mapped, tunnelled, reserved or metadata one."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _DENIED_4)
    return address in _PUBLIC_6 and not any(address in network for network in _DENIED_6)


async def resolve(name: str) -> Sequence[str]:
    """Ask the system."""
    found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


class Guard:
    """Lets requests to the `hosts` through (names, `*.example.org`, or `*` for all), on the `ports`.

    Addresses must be public, or lie in one of the `networks`. `*` does not stand for names that only a local resolver
    knows (`localhost`, one label, `*.internal` ...).
    """

    def __init__(
        self,
        *,
        hosts: Sequence[str],
        ports: Sequence[int],
        schemes: Sequence[str],
        networks: Sequence[str] = (),
        resolve: Resolve = resolve,
    ) -> None:
        self._hosts = tuple(hosts)
        self._ports = frozenset(ports)
        self._schemes = frozenset(schemes)
        self._networks = tuple(ipaddress.ip_network(network) for network in networks)
        self._resolve = resolve

    def read(self, text: str) -> URL:
        """The one reading of a URL, which is also the one that is used. Raises Denied.

        Refused before it is parsed: whatever two parsers could read differently.
        """
        if len(text) > _URL_CHARACTERS:
            raise Denied(f"a URL has at most {_URL_CHARACTERS} characters")
        if not _PRINTABLE.fullmatch(text) or "\\" in text:
            raise Denied("a URL is of printable ASCII characters without spaces and backslashes; encode others")
        match = _URL.fullmatch(text)
        if match is None:
            raise Denied("a URL begins with https:// or http:// and a host")
        authority = match[2].lower()
        if "@" in authority or "%" in authority:
            raise Denied("the host of a URL has no user, password or encoded characters")
        try:
            url = URL(text)
            host, port = url.raw_host, url.port
        except ValueError as error:
            raise Denied(f"not a URL: {error}") from None
        bracketed = f"[{host}]" if host is not None and ":" in host else host
        if port is None or authority not in (bracketed, f"{bracketed}:{port}") or url.scheme != match[1].lower():
            raise Denied("the host and port of the URL are not written plainly")
        self._check(str(bracketed), url.scheme, port)
        return url

    async def addresses(self, host: str) -> list[Address]:
        """What the host resolves to, asked once. Raises Denied, also when only one of the addresses is not allowed."""
        literal = _literal(host)
        try:
            found = [str(literal)] if literal is not None else await self._resolve(host)
            addresses = [ipaddress.ip_address(address) for address in found]
        except (OSError, ValueError, UnicodeError) as error:
            raise Denied(f"{host} does not resolve: {error}") from None
        if not addresses:
            raise Denied(f"{host} does not resolve")
        for address in addresses:
            self.check_address(address, host)
        return addresses

    def check_address(self, address: Address, host: str) -> None:
        """Raises Denied for an address that is neither public nor in one of the networks."""
        if not is_public(address) and not any(address in network for network in self._networks):
            raise Denied(f"{host} is at {address}, which is not a public address")

    def open_socket(self, found: Any) -> socket.socket:
        """The last look: a socket for the very address that will be connected to (an entry of getaddrinfo)."""
        family, kind, protocol, _, where = found
        self.check_address(ipaddress.ip_address(where[0]), str(where[0]))
        if where[1] not in self._ports:
            raise Denied(f"port {where[1]} is not allowed")
        return socket.socket(family, kind, protocol)

    def _check(self, host: str, scheme: str, port: int) -> None:
        if scheme not in self._schemes:
            raise Denied(f"{scheme} is not allowed, only {', '.join(sorted(self._schemes))}")
        if port not in self._ports:
            raise Denied(f"port {port} is not allowed, only {', '.join(map(str, sorted(self._ports)))}")
        address = _literal(host)
        if address is None:
            last = host.rsplit(".", 1)[-1]
            if len(host) > 253 or not _NAME.fullmatch(host) or _NUMBER.fullmatch(last):
                raise Denied(f"{host[:80]!r} is neither a name nor a plain address")
        if not any(_fits(host, rule, literal=address is not None) for rule in self._hosts):
            raise Denied(f"{host} is not one of the hosts that are allowed")
        if address is not None:
            self.check_address(address, host)


class Pinned(AbstractResolver):
    """Gives aiohttp the addresses that were checked, whatever the name resolves to by now."""

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = tuple(addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The addresses, for any name."""
        return [
            ResolveResult(
                hostname=host,
                host=str(address),
                port=port,
                family=socket.AF_INET if address.version == 4 else socket.AF_INET6,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """There is nothing to close."""


def _fits(host: str, rule: str, *, literal: bool) -> bool:
    if rule == "*":
        return literal or ("." in host and host.rsplit(".", 1)[-1] not in _INSIDE)
    if rule.startswith("*."):
        return not literal and host.endswith(rule[1:])
    return host == rule


def _literal(host: str) -> Address | None:
    if host.startswith("[") or ":" in host:
        try:
            return ipaddress.IPv6Address(host.strip("[]"))
        except ValueError:
            raise Denied(f"{host[:80]!r} is not an address") from None
    try:
        return ipaddress.IPv4Address(host) if _DOTTED.fullmatch(host) else None
    except ValueError:
        raise Denied(f"{host[:80]!r} is not an address") from None
