"""The process that is connected to Ray: `python -m swarmx.providers.ray --address ADDRESS --namespace NAME`."""

from __future__ import annotations

import asyncio
import logging
import os
import sys

import click
import msgspec

from swarmx.core.errors import ConfigError
from swarmx.providers.ray.link import Link
from swarmx.providers.ray.placing import address_of
from swarmx.providers.ray.wire import Answer, Connected

_KNOCK_S = 10.0


@click.command()
@click.option("--address", required=True, help="The cluster, as in `swarmx up --on`.")
@click.option("--namespace", required=True, help="Where the actors have their names.")
def main(address: str, namespace: str) -> None:
    """Answer requests on standard input until it ends. Meant for SwarmX itself, which starts it."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    out = os.dup(1)
    os.dup2(2, 1)  # whatever Ray prints is for people, and not an answer
    try:
        asyncio.run(_run(address_of(address), namespace, out))
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


async def _run(address: str, namespace: str, out: int) -> None:
    def answer(told: Answer) -> None:
        data = msgspec.json.encode(told) + b"\n"
        while data:
            data = data[os.write(out, data) :]

    try:
        from swarmx.providers.ray.cluster import Cluster  # needs Ray, and a second
    except ModuleNotFoundError as error:
        raise click.ClickException(f"{error}: Ray is needed here, pip install 'swarmx[ray]'") from None
    try:
        await _knock(address)
        cluster = Cluster(address, namespace)
    except Exception as error:  # noqa: BLE001  # of many types; whoever started this reads what it says
        raise click.ClickException(f"cannot reach Ray at {address}: {error}") from None
    answer(Connected())
    link = Link(cluster, answer=answer)
    reader = asyncio.StreamReader(limit=1 << 24)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)

    async def hear() -> None:
        async for news in cluster.news():
            link.hear(news)

    hearing = asyncio.create_task(hear())
    async for line in reader:
        link.take(line)
    hearing.cancel()
    cluster.close()


async def _knock(address: str) -> None:
    """Ray would try for more than a minute. Raises OSError where nobody listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host:
        _, writer = await asyncio.wait_for(asyncio.open_connection(host.strip("[]"), int(port)), _KNOCK_S)
        writer.close()


if __name__ == "__main__":
    main()
