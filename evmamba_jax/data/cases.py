"""Cases of the same kind, gathered while a data set is looked through and told in one line."""

from evmamba_jax.data.listing import counted
from evmamba_jax.errors import UserError

SHOWN = 5  # cases of a kind that are named; all are counted

Kind = tuple[str, str]  # what is told of one case, and of several: ("image is missing", "images are missing")


class Cases:
    """What was found, by kind, in the order in which the kinds were met."""

    def __init__(self):
        self._names: dict[Kind, list[str]] = {}

    def add(self, kind: Kind, name: str) -> None:
        """Add a case.

        Args:
            kind: what is told of one case, and of several.
            name: of the case.
        """
        self._names.setdefault(kind, []).append(name)

    def told(self) -> list[str]:
        """Return a line for each kind: the number of cases and the first names."""
        return [counted(names, *kind, most=SHOWN) for kind, names in self._names.items()]

    def refuse(self, what: str) -> None:
        """Refuse a data set that has any case.

        Args:
            what: the data set.

        Raises:
            UserError: there is a case; the line tells all kinds.
        """
        if self._names:
            raise UserError(f"{what} cannot be prepared: {'; '.join(self.told())}; mend this and prepare again")
