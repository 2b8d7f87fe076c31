"""Makes a model of the zoo, or goes on: ``python zoo/make.py NAME [key=value ...]``, the settings those of the recipe ptb-paper.

Trains it in ``runs/zoo/NAME``, prunes and compiles it, races it with dense networks, and reads the whole test split with the
compiled int8 file itself. Writes ``zoo/NAME.sfold``, what is known of it, ``zoo/NAME.json``, and of that its card,
``zoo/NAME.md``, which holds the settings. ``--card`` writes the card alone.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

from sparsefold.program import write_atomically
from sparsefold.recipes import paper
from sparsefold.recipes._config import override

ZOO = Path(__file__).resolve().parent


def command(*words: str) -> str:
    """What a command of ours prints on its standard output."""
    return subprocess.run(
        [sys.executable, "-m", "sparsefold.cli", *words], check=True, stdout=subprocess.PIPE
    ).stdout.decode()


def card(path: Path) -> str:
    """The card of a model, of its facts: what it is, what it was trained on and how, and what was counted and timed."""
    r = json.loads(path.read_text())
    name, lm, read, about, sizes = path.stem, r["lm"], r["read"], r["provenance"], r["corpus"]["bytes"]
    macs, dense = (read["cost"][key] for key in ("macs_effective", "macs_dense"))
    densities = ", ".join(f"{key} {value:.1%}" for key, value in r["density"].items())
    rates = ", ".join(f"{layer['event_rate']:.1%}" for layer in read["event_rates"])
    times = [(row["latency_us"]["p50"], row["network"], row["engine"]) for row in r["race"]]
    ours = {engine: us for us, network, engine in times if network.startswith("egru")}
    own, wide = ours["sparsefold i8"], ours["sparsefold"]
    rows = [f"| {network} | {engine} | {us:.1f} | {us / own:.1f}x |" for us, network, engine in sorted(times)]
    more, sha, threads = dense / macs, r["corpus"]["sha256"][:16], f"{lm['threads']} thread(s) of {about['processor']}"
    units, megabytes = "+".join(map(str, lm["hidden"])), r["file"]["bytes"] / 1e6
    minutes, newline = r["training"]["seconds"] / 60, "\n"
    return f"""# {name}

A byte-level language model of English technical text: an event-based GRU of {units} units, pruned in blocks of 16x1, with
int8 weights: {megabytes:.2f} MB. This card is made of [{path.name}]({path.name}) by `zoo/make.py`.

```bash
sparsefold run zoo/{name}.sfold --prompt "{r["sample"]["prompt"]}"
sparsefold eval zoo/{name}.sfold --text my.txt
```

| | |
|---|---|
| bits per character of the test split, by this file | {read["bits_per_char"]:.4f} |
| the same network in float32: valid, test | {r["valid_bits"]:.4f}, {r["test_bits"]:.4f} |
| weights that are left | {r["density_of_all"]:.1%} ({densities}) |
| units that speak, layer by layer | {rates} |
| MACs of a byte, embedding and decoder included (counted) | {macs:,.0f}; a dense network {dense:,.0f}, {more:.1f}x as many |
| time of a byte on one core (measured) | {own:.1f} µs; in float32 {wide:.1f} µs |

**Trained on** the reference text that CPython {r["python"]} carries as `pydoc_data.topics`: {sizes["train"]:,} bytes,
{sizes["valid"]:,} and {sizes["test"]:,} more for validation and test, sha256 `{sha}…`. It is part of Python's documentation,
© Python Software Foundation, [PSF licence version 2](https://docs.python.org/3/license.html). Other versions of Python carry
other texts: `eval` without `--text` says so.

**Trained by** {lm["steps"]:,} steps of {lm["batch"]} pieces of about {lm["bptt"]} bytes, {threads},
{minutes:.0f} minutes, seed {lm["seed"]}:

```bash
{r["made"]}
```

**Time**: one race, one thread, pinned. The dense networks are untrained, for their time does not depend on weights, and have
about as many weights as the event network before it was pruned. "sparsefold i8" on the event network is this file.

| network | engine | µs of a byte, p50 | against this file |
|---|---|---|---|
{newline.join(rows)}

{about["processor"]}, {about["isa"]}, commit {about["commit"]}.

**Not for** anything but trying the library: it knows one small text, repeats pieces of it, and states falsehoods about Python
with confidence. What it wrote, drawn at temperature 0.5, seed 0:

```text
{r["sample"]["text"].strip()}
```
"""


def main() -> None:
    """Trains, or goes on, and writes the file and its facts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("settings", nargs="*", metavar="key=value")
    parser.add_argument("--prompt", default="The with statement", help="of the sample on the card")
    parser.add_argument("--card", action="store_true", help="write the card alone")
    args = parser.parse_intermixed_args()
    folder, file, facts = ZOO.parent / "runs/zoo" / args.name, ZOO / f"{args.name}.sfold", ZOO / f"{args.name}.json"
    if not args.card:
        make(args, folder, file, facts)
    write_atomically(file.with_suffix(".md"), card(facts).encode())


def make(args: argparse.Namespace, folder: Path, file: Path, facts: Path) -> None:
    """The model and its facts."""
    try:
        result = paper.run(override(paper.Config(corpus="", level="byte"), args.settings), folder, args.name)
    except KeyboardInterrupt as stop:
        raise SystemExit(f"{stop} The same command goes on.") from None
    write_atomically(file, (folder / "paper-i8.sfold").read_bytes())
    sample = command("run", str(file), "--prompt", args.prompt, "--tokens", "400", "--temperature", "0.5")
    read = json.loads(command("eval", str(file), "--json"))
    raw = file.read_bytes()
    result |= {
        "made": shlex.join(["python", "zoo/make.py", args.name, *args.settings]),
        "file": {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()},
        "read": read,
        "sample": {"prompt": args.prompt, "text": sample},
        "python": ".".join(map(str, sys.version_info[:2])),
    }
    write_atomically(facts, json.dumps(result, indent=1).encode())
    print(paper.told(result))
    print(f"{file}: {len(raw) / 1e6:.2f} MB, {read['bits_per_char']:.4f} bits per character")


if __name__ == "__main__":
    main()
