"""Reads SMILES, in which chemists write molecules as text: its tokens, its atoms, and the bonds between them.

Atoms are letters or stand in brackets, `(` and `)` enclose a branch, a number that occurs twice closes a ring, `.`
stands between molecules and `>>` between reactants and products. The chemistry is not checked.
"""

import re
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

SPECIAL = ("[CLS]", "[SEP]")  # tokens of the model that look like atoms in brackets
ARROW = ">>"

_TOKEN = re.compile(r"\[[^\]]*\]|Br|Cl|%\d\d|>>|.")
# Isotope, symbol, chirality, hydrogens, charge and map number.
_BRACKET = re.compile(r"\[(\d*)(\*|[A-Z][a-z]?|[a-z][a-z]?)(?:@[@A-Z\d]*)?(?:H\d*)?([+-]*\d*)(?::(\d+))?\]")


class Atom(NamedTuple):
    """An atom as it is written.

    Attributes:
      token: the number of its token.
      symbol: of its element, in lower case if it is aromatic.
      isotope, charge: as written, empty if not.
      map_number: equal for an atom of the product and the atom of the reactants that it comes from; 0 for others.
    """

    token: int
    symbol: str
    isotope: str = ""
    charge: str = ""
    map_number: int = 0

    @property
    def kind(self) -> tuple[str, str, str]:
        """Symbol, isotope and charge, without the number of its token."""
        return self.symbol, self.isotope, self.charge


class Graph(NamedTuple):
    """Atoms and the bonds between them.

    Attributes:
      atoms: in the order of the text.
      bonds: the sign of the bond, such as "=", by the numbers of its two atoms; a bond without a sign is ":" between
        two aromatic atoms and "-" between others.
    """

    atoms: tuple[Atom, ...]
    bonds: dict[tuple[int, int], str]

    def tokens(self) -> Int[np.ndarray, "A"]:
        """Return the number of each atom's token."""
        return np.array([atom.token for atom in self.atoms], int)

    def elements(self) -> np.ndarray:
        """Return the element of each atom, aromatic or not."""
        return np.array([atom.symbol.capitalize() for atom in self.atoms])

    def adjacency(self) -> Bool[np.ndarray, "A A"]:
        """Return whether a bond connects two atoms."""
        adjacency = np.zeros((len(self.atoms), len(self.atoms)), bool)
        for a, b in self.bonds:
            adjacency[a, b] = adjacency[b, a] = True
        return adjacency


def tokenize(smiles: str) -> list[str]:
    """Split SMILES into its tokens: atoms, bonds, parentheses, ring numbers, "." and ">>"."""
    return _TOKEN.findall(smiles)


def is_atom(token: str) -> bool:
    """Return whether a token is an atom."""
    return token not in SPECIAL and (token[0].isalpha() or token[0] in "[*")


def read(tokens: Sequence[str]) -> Graph:
    """Read the atoms and bonds of molecules or of a reaction.

    Args:
      tokens: of `tokenize`; those in `SPECIAL` are skipped.

    Raises:
      ValueError: a parenthesis or ring is not closed or not opened, or an atom in brackets cannot be read.
    """
    atoms, bonds = [], {}
    last, sign = None, ""  # the atom that the next one is bound to, and the sign of the bond
    branches, rings = [], {}
    for number, token in enumerate(tokens):
        if is_atom(token):
            atoms.append(_atom(number, token))
            if last is not None:
                bonds[last, len(atoms) - 1] = sign
            last, sign = len(atoms) - 1, ""
        elif token == "(":
            branches.append(last)
        elif token == ")" and branches:
            last = branches.pop()
        elif token in (".", ARROW):
            last, sign = None, ""
        elif token[-1].isdigit() and last is not None:
            ring = int(token.lstrip("%"))
            if ring in rings:
                first, first_sign = rings.pop(ring)  # the sign may stand at either end
                bonds[first, last] = sign or first_sign
            else:
                rings[ring] = last, sign
            sign = ""
        elif token in ")0123456789" or token[0] == "%":
            raise ValueError(f"SMILES: token {number}, {token!r}, closes nothing or follows no atom")
        elif token not in SPECIAL:
            sign += token  # two tokens for the arrow ->
    if branches or rings:
        raise ValueError(f"SMILES: not closed: {len(branches)} parentheses, rings {sorted(rings)}")
    return Graph(tuple(atoms), {pair: _sign(sign, *(atoms[a] for a in pair)) for pair, sign in bonds.items()})


def colors(graph: Graph, labels: Sequence[Hashable]) -> list[int]:
    """Number the atoms so that atoms have the same number if their labels and surroundings are the same.

    Atoms with equal labels are told apart by the numbers of their neighbours, until no more can be (Weisfeiler and
    Leman 1968; Morgan 1965). Bonds written "~" are left out: they hold ions together that other programs write apart.

    Args:
      graph: its molecules; to compare two molecules, read both as one text.
      labels: one per atom.
    """
    neighbours = [[] for _ in graph.atoms]
    for (a, b), sign in graph.bonds.items():
        if sign != "~":
            neighbours[a].append((b, sign))
            neighbours[b].append((a, sign))
    found, before = _numbers(labels), 0
    while len(set(found)) > before:
        before = len(set(found))
        around = [tuple(sorted((found[b], sign) for b, sign in near)) for near in neighbours]
        found = _numbers(list(zip(found, around)))
    return found


def _atom(number: int, token: str) -> Atom:
    if token[0] != "[":
        return Atom(number, token)
    match = _BRACKET.fullmatch(token)
    if match is None:
        raise ValueError(f"SMILES: token {number}, {token!r}, is not an atom")
    isotope, symbol, charge, map_number = match.groups()
    return Atom(number, symbol, isotope, charge, int(map_number or 0))


def _sign(sign: str, first: Atom, second: Atom) -> str:
    if sign in ("", "/", "\\"):  # slashes are single bonds with a direction
        return ":" if not sign and first.symbol.islower() and second.symbol.islower() else "-"
    return sign


def _numbers(labels: Sequence[Hashable]) -> list[int]:
    """Return equal numbers for equal labels."""
    number_of: dict[Hashable, int] = {}
    return [number_of.setdefault(label, len(number_of)) for label in labels]
