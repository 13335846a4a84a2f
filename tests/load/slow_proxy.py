"""`python -m tests.load.slow_proxy LISTEN TARGET DELAY_S`: a unix-socket proxy that delays each direction."""

import asyncio
import contextlib
import sys


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float) -> None:
    """Passes bytes on, each chunk `delay_s` after it came, in order."""
    loop = asyncio.get_running_loop()
    chunks: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def write() -> None:
        while True:
            due, data = await chunks.get()
            await asyncio.sleep(due - loop.time())
            writer.write(data)
            if not data:
                writer.close()
                return

    writing = asyncio.create_task(write())
    with contextlib.suppress(ConnectionError):  # either end may be killed
        while data := await reader.read(1 << 20):
            chunks.put_nowait((loop.time() + delay_s, data))
    chunks.put_nowait((loop.time() + delay_s, b""))
    with contextlib.suppress(ConnectionError):
        await writing


async def main(listen: str, target: str, delay_s: float) -> None:
    """Serves until it is killed."""

    async def on_connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(target)
        await asyncio.gather(pump(reader, up_writer, delay_s), pump(up_reader, writer, delay_s))

    server = await asyncio.start_unix_server(on_connect, listen)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
