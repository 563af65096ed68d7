"""On how many of 195 public networks structures are found, given noise and removed as they come, and how many can go.

    OMP_NUM_THREADS=1 python analysis/any_network.py --out analysis/results/any_network.csv
    OMP_NUM_THREADS=1 python analysis/any_network.py --peer --out analysis/results/any_network_peer.csv
    python analysis/any_network.py --markdown --out … --peer-out …

A row for each network of public_networks.py, each in a process of its own with one thread, 120 s and 8 GB. Networks
that the CSV has are passed over, so the command can be called again. --only PATTERN takes those whose name or
"source/name" matches, --again does them anew, --check only builds them and calls them, --peer tries torch-pruning (see
any_network_peer.py). A summary is printed at the end.

What is done: `insert_noise` as the network comes from its builder; new random weights for the copy with noise (with
those of the builder outputs hardly depend on inputs); `remove_structures` with a random half of each group (each
structure with probability one half, at least one goes and one stays).

status:
    handled  at least one structure was found, and the smaller network is right
    refused  StructureError or ValueError before anything was removed, also where nothing can be removed
    wrong    the smaller network fails, or its outputs differ, in whichever comparison
    timeout, memory  more than --timeout seconds, or --memory GB resident
    error    anything else
seconds_insertion: of insert_noise, which finds the structures. seconds: with the removal too. Both are seconds of the
    processor, of which one thread uses no more than one a second, so other work on the machine does not count.
peak_mb: largest resident memory (MiB) until the removal was done, with Python and torch.
parameters, groups, structures: of the network, and of what was found.
share_removable: Σ (size before − size after) / Σ size before, over the parameters of the network but embeddings and
    output layers, after the `Cuts` that keep the first structure of each group alone. Embeddings are the weights of
    `nn.Embedding`, and parameters that are position tables or tokens by name. Output layers are those whose results
    are the outputs of the network, with nothing behind that adds or normalises.
difference: largest difference of an output in float64, relative to its spread over examples (at least 1 % of its size),
    of the smaller network and the one with noise with θ = 0 for what was removed, on new random inputs. Wrong above
    1e-10, or above 1e-6 where changing the weights by 2⁻⁵² of themselves changes the outputs by a tenth of it.
checked: the difference that `remove_structures` returns for its own comparison.
control: the same difference where one removed structure of each group acts again, which must be seen.
spread: of the outputs over the examples, relative to their size, the largest of the outputs. Below 1e-3 the status
    is "error": nothing could be seen.
precision: float64 throughout, also where a network asks for float32 within its forward pass; or float32 where the
    network can't run in float64; then wrong begins at 1e-5.
refused: channels that stay because they can't be followed or cut: entries of `Structures.refused` that are unsupported.
error: one line.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import pandas as pd
from any_network_summary import markdown, summary
from public_networks import PublicNetwork, public_networks

from pyro_bmrs.files import write_table

HERE = Path(__file__).parent
KEYS = ["source", "name", "kind"]
COLUMNS = {
    "ours": [
        *KEYS, "status", "seconds_insertion", "seconds", "peak_mb", "parameters", "groups", "structures",
        "share_removable", "difference", "checked", "control", "spread", "precision", "refused", "error",
    ],
    "peer": [
        *KEYS, "status", "compared", "seconds", "peak_mb", "parameters", "groups", "removed", "difference", "error",
    ],
    "check": [*KEYS, "status", "seconds", "peak_mb", "parameters", "spread", "precision", "error"],
}  # fmt: skip


def alone(network: PublicNetwork, mode: str, timeout: float, memory: float) -> dict[str, Any]:
    """The row of one network, from a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--of",
        network.source,
        network.name,
        mode,
        "--timeout",
        str(timeout),
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    begin, killed = time.monotonic(), ""
    while True:
        try:
            output, errors = process.communicate(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            # the process counts its own seconds; this is for one that sleeps, or waits for a busy machine
            if _resident(process.pid) > memory * 1e9:
                killed = "memory"
            elif time.monotonic() - begin > 10 * timeout:
                killed = "timeout"
            if killed:
                process.kill()
    row: dict[str, Any] = {"source": network.source, "name": network.name, "kind": network.kind}
    for line in output.splitlines():
        row |= json.loads(line)
    if killed or process.returncode == -signal.SIGXCPU:
        row["status"] = killed or "timeout"
    elif process.returncode:
        last = (errors.strip().splitlines() or [""])[-1]
        row |= {"status": "error", "error": f"ended with {process.returncode}: {last}"[:300]}
    elif row.get("peak_mb", 0) * 2**20 > memory * 1e9:
        row["status"] = "memory"
    return row


def _resident(process: int) -> float:
    """Bytes that a process has in memory; 0 if it has ended."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096.0
    except (OSError, IndexError):
        return 0.0


def survey(given: argparse.Namespace, mode: str) -> pd.DataFrame:
    """The rows of all networks asked for, added to those that the file has."""
    table = (
        pd.read_csv(given.out) if given.out and given.out.exists() else pd.DataFrame(columns=COLUMNS[mode])
    )
    networks = [
        network
        for network in public_networks()
        if any(
            fnmatch.fnmatch(name, given.only) for name in (network.name, f"{network.source}/{network.name}")
        )
    ]
    done = set() if given.again else set(zip(table.source, table.name, strict=True))
    left = [network for network in networks if (network.source, network.name) not in done]
    order = {(n.source, n.name): place for place, n in enumerate(public_networks())}
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = [pool.submit(alone, network, mode, given.timeout, given.memory) for network in left]
        for number, row in enumerate(as_completed(rows), 1):
            new = pd.DataFrame([row.result()], columns=COLUMNS[mode])
            same = (table.source == new.source[0]) & (table.name == new.name[0])
            table = new if table[~same].empty else pd.concat([table[~same], new], ignore_index=True)
            keys = [order.get(key, len(order)) for key in zip(table.source, table.name, strict=True)]
            table = table.iloc[pd.Series(keys).argsort()].reset_index(drop=True)
            if given.out:
                write_table(given.out, table)
            told = ", ".join(
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in row.result().items()
                if name != "kind"
            )
            print(f"{number} of {len(left)}: {told}", file=sys.stderr, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the CSV; default: nothing is written")
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help='of "source/name", such as "timm/vit*"'
    )
    parser.add_argument("--again", action="store_true", help="also networks that the CSV has")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds of the processor for a network")
    parser.add_argument("--memory", type=float, default=8.0, help="GB for a network")
    parser.add_argument("--peer", action="store_true", help="torch-pruning")
    parser.add_argument("--check", action="store_true", help="only build and call the networks")
    parser.add_argument("--markdown", action="store_true", help="print the tables of --out and --peer-out")
    parser.add_argument("--peer-out", type=Path, help="the CSV of --peer, to stand beside")
    parser.add_argument("--of", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.of:
        from any_network_trial import tried

        source, name, mode = given.of
        tried(next(n for n in public_networks() if (n.source, n.name) == (source, name)), mode, given.timeout)
        return
    mode = "peer" if given.peer else "check" if given.check else "ours"
    if given.markdown and not given.out:
        parser.error("--markdown needs --out, the CSV to read")
    table = pd.read_csv(given.out) if given.markdown else survey(given, mode)
    if mode == "ours":
        peer = pd.read_csv(given.peer_out) if given.peer_out else None
        print(markdown(table, peer) if given.markdown else summary(table))
    else:
        print(table.groupby(["source", "status"]).size().unstack(fill_value=0).to_string())


if __name__ == "__main__":
    main()
