"""What a plan says of one of two ranks, against the storages that are alive in two real ones, and what they send.

On the CPU, over gloo, whose own buffers are not counted: python benchmarks/plan_of_ranks.py
"""

import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))
sys.path.append(str(Path(__file__).parent.parent / "tests" / "training"))

from test_plans_of_ranks import NETWORKS, measured, planned

from fewstep.networks.precision import DTYPES
from ranks import in_ranks

SETTINGS = {
    "kept": ["parallel.shard=full"],
    "gathered again": ["parallel.shard=full", "parallel.keep_gathered=false"],
    "kept, two parts, blocks computed again": ["parallel.shard=full", "accumulate=2", "checkpointing=blocks"],
    "replicated": [],
}


def main() -> None:
    print("| | dtype | | planned MB | alive | ratio | messages, planned | counted |")
    print("|---|---|---|--:|--:|--:|--:|--:|")
    for precision in reversed(DTYPES):
        for name in NETWORKS:
            for told, settings in SETTINGS.items():
                with tempfile.TemporaryDirectory() as folder:
                    truth = in_ranks(2, Path(folder), measured, name, precision, settings)[0]
                found = planned(name, precision, settings)
                sizes = f"{found.peak / 1e6:.1f} | {truth['peak'] / 1e6:.1f} | {found.peak / truth['peak']:.3f}"
                messages = f"{sum(found.messages.values()):.1f} | {truth['messages']:.1f}"
                print(f"| {name} | {precision} | {told} | {sizes} | {messages} |", flush=True)


if __name__ == "__main__":
    main()
