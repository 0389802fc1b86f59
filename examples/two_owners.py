"""Two owners and a coordinator, through the Python API.

    python examples/two_owners.py FOLDER_OF_PUBLIC_TEXT FOLDER_OF_ONE_OWNER FOLDER_OF_ANOTHER

Each folder's name becomes its expert's name. Writes into ./two-owners. Add --quick for a run of seconds.
"""

from __future__ import annotations

import sys
from pathlib import Path

import flexctl


def main(public: Path, owners: list[Path], quick: bool) -> None:
    root = Path("two-owners")
    anchor, merged = root / "anchor", root / "merged"
    made = flexctl.init_anchor(
        flexctl.InitAnchorConfig(data=(public,), output=anchor, preset="nano", max_tokens=4_000 if quick else None)
    )
    print(f"anchor: {made.num_parameters:,} parameters, {made.digest}")

    experts = []
    for owner in owners:
        trained = flexctl.train_expert(
            flexctl.TrainExpertConfig(
                data=(owner,),
                anchor=anchor,
                output=root / f"{owner.name.lower()}.st",
                max_steps=2 if quick else None,
            )
        )
        gained = trained.held_out["own"]
        print(f"{trained.name}: held-out loss {gained['before']:.3f} -> {gained['after']:.3f} nats a token")
        experts.append(trained.path)

    flexctl.merge(flexctl.MergeConfig(experts=tuple(experts), anchor=anchor, output=merged))
    first = experts[0].stem
    removed = flexctl.remove(flexctl.RemoveConfig(names=(first,), source=merged, output=root / "without"))
    never = flexctl.merge(flexctl.MergeConfig(experts=tuple(experts[1:]), anchor=anchor, output=root / "never-had-it"))
    print(f"removed {first}: same bytes as a merge that never had it: {removed.digest == never.digest}")


if __name__ == "__main__":
    quick = "--quick" in sys.argv
    folders = [Path(argument) for argument in sys.argv[1:] if argument != "--quick"]
    if len(folders) != 3:
        sys.exit(__doc__)
    main(folders[0], folders[1:], quick)
