"""Trust files: which keys are whose, for which bundles, and how long.

```toml
[[owners]]
name = "St Mary's Hospital"
key = "MCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE="
bundles = ["medicine", "medicine-*"]   # optional: the only names that it may sign; a merged model's is merged
valid_from = 2026-01-01                # optional
valid_until = 2027-12-31               # optional: the last day
revoked = 2026-11-05                   # optional: from this day on nothing that it signed counts, whenever it did
```
"""

from __future__ import annotations

import datetime
import fnmatch
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexctl import workspace
from flexctl.bundle.names import shown
from flexctl.errors import UsageError
from flexctl.trust.keys import public_key

if TYPE_CHECKING:
    from securesystemslib.signer import SSlibKey

__all__ = ["Owner", "read_trust"]

MAX_TRUST_BYTES = 1_000_000
_FIELDS = ("name", "key", "bundles", "valid_from", "valid_until", "revoked")
_DATES = ("valid_from", "valid_until", "revoked")


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """One key of a trust file.

    Attributes:
        name: Whose it is.
        key: The public key.
        bundles: Patterns of the names that it may sign; None is any.
        valid_from: First day; None is always.
        valid_until: Last day; None is without end.
        revoked: From this day on it counts for nothing; None is never.
    """

    name: str
    key: SSlibKey
    bundles: tuple[str, ...] | None = None
    valid_from: datetime.date | None = None
    valid_until: datetime.date | None = None
    revoked: datetime.date | None = None

    def objection(self, bundle: str, day: datetime.date, today: datetime.date) -> str | None:
        """Return why a signature of this key does not count; None where it does.

        Args:
            bundle: Name of what was signed.
            day: The day that must lie within the key's validity.
            today: The day that revocation is compared with.
        """
        if self.revoked is not None and today >= self.revoked:
            return f"the key of {self.name} is revoked since {self.revoked}"
        if self.valid_from is not None and day < self.valid_from:
            return f"the key of {self.name} is valid from {self.valid_from} on"
        if self.valid_until is not None and day > self.valid_until:
            return f"the key of {self.name} was valid until {self.valid_until}"
        if self.bundles is not None and not any(fnmatch.fnmatchcase(bundle, pattern) for pattern in self.bundles):
            return f"{self.name} may sign {', '.join(self.bundles) or 'nothing'}, not {bundle}"
        return None

    @property
    def ends(self) -> str:
        """When trust in this key ends, in words."""
        days = [day for day in (self.valid_until, self.revoked) if day is not None]
        return f"until {min(days)}" if days else "without end"


def read_trust(path: Path) -> tuple[Owner, ...]:
    """Return the keys of a trust file, in its order.

    Raises:
        UsageError: There is no such file, it is not TOML, or a field is missing, unknown or wrong.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file", hint="flexctl keygen shows what goes into a trust file")
    if path.stat().st_size > MAX_TRUST_BYTES:
        raise UsageError(f"{path}: has more than {MAX_TRUST_BYTES} bytes, too many for a trust file")
    table = workspace.read_toml(path)
    listed = table.get("owners")
    if set(table) != {"owners"} or not isinstance(listed, list) or not listed:
        raise UsageError(f"{path}: expected owners alone, each written [[owners]]")
    owners = tuple(_owner(item, f"{path}: owners.{index}") for index, item in enumerate(listed))
    for index, owner in enumerate(owners):
        if any(owner.key.keyid == other.key.keyid for other in owners[:index]):
            raise UsageError(f"{path}: owners.{index}.key stands twice: one key is one owner's")
    return owners


def _owner(item: Any, where: str) -> Owner:
    if not isinstance(item, dict):
        raise UsageError(f"{where} is {shown(item)}; expected a table, written [[owners]]")
    for field in item:
        if field not in _FIELDS:
            raise UsageError(f"{where}: unknown key {shown(field)}; known are {', '.join(_FIELDS)}")
    for field in ("name", "key"):
        if not isinstance(item.get(field), str) or not item[field].strip():
            raise UsageError(f"{where}.{field} is {shown(item.get(field))}; expected text in quotes")
    for field in _DATES:
        if type(item.get(field)) not in (type(None), datetime.date):
            raise UsageError(f"{where}.{field} is {shown(item[field])}; expected a date as 2030-12-31, without quotes")
    bundles = item.get("bundles")
    if bundles is not None and not (isinstance(bundles, list) and all(isinstance(name, str) for name in bundles)):
        raise UsageError(f"{where}.bundles is {shown(bundles)}; expected a list of names")
    return Owner(
        name=" ".join(item["name"].split()),
        key=public_key(item["key"], f"{where}.key"),
        bundles=None if bundles is None else tuple(bundles),
        **{field: item.get(field) for field in _DATES},
    )
