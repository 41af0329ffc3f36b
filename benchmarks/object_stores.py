"""Reading ranges of an object through obstore and through s3fs, from a server on this machine.

The server is moto's, an S3-compatible one in Python in a process of its own: it answers a few
hundred requests a second, so wall time is partly its own. The CPU seconds are those of the client's
process alone, which is started for every cell.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from statistics import median

BUCKET, KEY = "bench", "object"
SIZES = {"64 KiB": 2**16, "1 MiB": 2**20, "16 MiB": 2**24, "64 MiB": 2**26}
THREADS = (1, 4)
MOST = 2**28
"""Bytes that a cell reads at most."""
MOST_REQUESTS = 100
ROUND = 4
"""Ranges that an object has: the server reads all of it for each of them."""


def client(library: str, size: int, threads: int, endpoint: str) -> None:
    """Read ranges one after the other, and print the seconds, CPU seconds and bytes."""
    key = f"{KEY}-{size}"
    count = min(MOST // size, MOST_REQUESTS)
    starts = [n % ROUND * size for n in range(count)]
    if library == "obstore":
        import obstore
        from obstore.store import S3Store

        store = S3Store(BUCKET, client_options={"allow_http": True})
        tag = obstore.head(store, key)["e_tag"]

        def read(start: int) -> int:
            options = {"range": (start, start + size), "if_match": tag}
            return len(obstore.get(store, key, options=options).buffer())
    else:
        import s3fs

        system = s3fs.S3FileSystem(client_kwargs={"endpoint_url": endpoint})

        def read(start: int) -> int:
            return len(system.cat_file(f"{BUCKET}/{key}", start=start, end=start + size))

    read(0)  # opens a connection
    usage = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        read_bytes = sum(pool.map(read, starts))
    wall = time.perf_counter() - began
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - usage.ru_utime - usage.ru_stime
    print(json.dumps([wall, cpu, read_bytes]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--client", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        library, size, threads, endpoint = options.client
        client(library, int(size), int(threads), endpoint)
        return
    server = "from moto.server import ThreadedMotoServer as S; s = S('127.0.0.1', 0, verbose=False)"
    server += "; s.start(); print(s.get_host_and_port()[1], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", server],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        endpoint = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "bench",
            "AWS_SECRET_ACCESS_KEY": "bench",
            "AWS_REGION": "us-east-1",
        }
        import boto3

        own = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
        own.create_bucket(Bucket=BUCKET)
        for size in SIZES.values():
            own.put_object(Bucket=BUCKET, Key=f"{KEY}-{size}", Body=os.urandom(ROUND * size))
        print(
            "| range | threads | obstore, MB/s | s3fs, MB/s | obstore, CPU s/GB | s3fs, CPU s/GB |"
        )
        print("|---|---:|---:|---:|---:|---:|")
        for label, size in SIZES.items():
            for threads in THREADS:
                found: dict[str, list[list[float]]] = {"obstore": [], "s3fs": []}
                for _ in range(options.turns):
                    for library, cells in found.items():
                        arguments = [library, str(size), str(threads), endpoint]
                        finished = subprocess.run(
                            [sys.executable, __file__, "--client", *arguments],
                            capture_output=True,
                            check=True,
                        )
                        cells.append(json.loads(finished.stdout))
                row = [label, str(threads)]
                for cells in found.values():
                    row.append(f"{median(n / wall for wall, _, n in cells) / 1e6:.0f}")
                for cells in found.values():
                    row.append(f"{median(cpu / n for _, cpu, n in cells) * 1e9:.2f}")
                print(f"| {' | '.join(row)} |", flush=True)
        process.terminate()


if __name__ == "__main__":
    main()
