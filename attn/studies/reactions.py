"""Attention that can be checked, right or wrong: a pretrained model that maps atoms of a product to the reactants.

The package rxnmapper on PyPI holds an ALBERT that learned to restore hidden tokens of chemical reactions. One of its
heads attends from an atom of the product to the atom of the reactants that it was before the reaction, and back. The
package also holds reactions with expected mappings, and the confidence in them. Here our attention maps of that model
are turned into mappings, and each head is compared with the expected ones. These were computed from that very head,
with rules about elements and neighbours: whether a head agrees with them without the rules is what `accuracies` says.

wheel = reactions.find()
cases = reactions.read_cases(wheel)
read = [reactions.read_reaction(case.reaction) for case in cases]
maps = reactions.attention_maps(attn.pretrained.load(wheel.model), read)
mapping, confidences = reactions.assign(maps[0][LAYER, HEAD], read[0])

Source: Schwaller, Hoover, Reymond, Strobelt and Laino 2021, Extraction of organic chemistry grammar from unsupervised
learning of chemical reactions, Science Advances 7 (15). The package is not imported, since it needs torch and RDKit.
"""

import ast
import importlib.metadata
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from attn.pretrained import Pretrained
from attn.studies.smiles import ARROW, SPECIAL, Graph, colors, read, tokenize

PACKAGE, VERSION = "rxnmapper", "0.4.3"
INSTALL = "pip install --no-deps --require-hashes -r requirements-models.txt"
LAYER, HEAD = 10, 5  # counted from 0: the head that the package uses
_NEIGHBOURS = 90.0  # factor for pairs of atoms next to a pair that has been mapped
_NOTHING = 1e-8  # a probability that counts as none

# The package rewrites most reactions with RDKit before its model reads them. RDKit writes four of their compounds
# differently: these were recorded with RDKit 2026.9.1.
_REWRITTEN = {
    "BrCC": "CCBr",
    "[Na+]~[H-]": "[H-]~[Na+]",
    "[Na+]~[Br-]": "[Br-]~[Na+]",
    "C=CCN1C(C2=CN3CCCCC3=N2)=NN=C1N(C)CC1=CC=C(C#N)C=C1": "C=CCn1c(-c2cn3c(n2)CCCC3)nnc1N(C)Cc1ccc(C#N)cc1",
}


class Wheel(NamedTuple):
    """The files of the installed package.

    Attributes:
      model: the folder with config.json, the weights and vocab.txt.
      tests: files with expected mappings.
      readme: its description, which has examples.
    """

    model: pathlib.Path
    tests: tuple[pathlib.Path, ...]
    readme: str


class Case(NamedTuple):
    """A reaction with the mapping that the package expects.

    Attributes:
      name: where it is from, such as "test_fragment_bond 0".
      reaction: the SMILES that the model reads.
      mapped: SMILES with map numbers: atom p of the product, counted from 0 as the model reads them, has number p + 1,
        as does the atom of the reactants that it comes from. Its atoms may be in another order than in `reaction`.
      confidence: the product of the probabilities of all pairs, if the package gives it.
    """

    name: str
    reaction: str
    mapped: str
    confidence: float | None


class Reaction(NamedTuple):
    """A reaction as the model reads it.

    Attributes:
      tokens: T tokens with those at both ends.
      graph: the atoms and bonds of both sides: first R atoms of the reactants, then P of the product.
      num_reactants: R.
    """

    tokens: tuple[str, ...]
    graph: Graph
    num_reactants: int


def find() -> Wheel:
    """Find the installed package without importing it.

    Raises:
      ModuleNotFoundError: it is not installed, or in another version; the message says what to do.
    """
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise ModuleNotFoundError(f"{PACKAGE} {VERSION} is not installed; {INSTALL}") from None
    if package.version != VERSION:
        raise ModuleNotFoundError(f"{PACKAGE} {package.version} is installed, must be {VERSION}; {INSTALL}")
    files = [pathlib.Path(package.locate_file(file)) for file in package.files or ()]
    configs = [file for file in files if file.name == "config.json"]
    tests = [file for file in files if file.parent.name == "tests" and file.name.startswith("test_")]
    if not (configs and tests and all(file.is_file() for file in (*configs, *tests))):
        raise ModuleNotFoundError(f"{PACKAGE} {VERSION} is installed without its model or its tests; {INSTALL}")
    return Wheel(configs[0].parent, tuple(sorted(tests)), package.read_text("METADATA") or "")


def read_cases(wheel: Wheel) -> list[Case]:
    """Return all mappings that the tests and the description of the package expect. No code of it is executed."""
    cases = []
    for path in wheel.tests:
        module = ast.parse(path.read_text(encoding="utf-8"))
        rewritten = _keyword(module, "canonicalize")
        for function in module.body:
            if isinstance(function, ast.FunctionDef):
                cases += _cases_of(function.name, function.body, _keyword(function, "canonicalize_rxns", rewritten))
    examples = "\n".join(re.findall(r"```python\n(.*?)```", wheel.readme, re.DOTALL))
    return [*cases, *_cases_of("README", ast.parse(examples).body)]


def distinct(cases: Sequence[Case]) -> list[Case]:
    """Return the first case of each reaction: some tests of the package share reactions."""
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.reaction, case)
    return list(first.values())


def _keyword(tree: ast.AST, name: str, default: bool = True) -> bool:
    """Return the literal value of a keyword argument of the calls in a tree."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    values = [each.value for call in calls for each in call.keywords if each.arg == name]
    return next((value.value for value in values if isinstance(value, ast.Constant)), default)


def _cases_of(name: str, body: list[ast.stmt], rewritten: bool = True) -> Iterator[Case]:
    """Pair the reactions of a function with the expected mappings that follow them."""
    given: list[ast.expr] = []
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="rxns")], value=ast.List(elts=given)):
                continue
            case ast.Assign(targets=[ast.Name(id="expected")], value=ast.List(elts=rows)):
                pass
            case ast.Expr(value=ast.List(elts=rows)):
                pass
            case ast.Assert(test=ast.Compare(comparators=[ast.List(elts=rows)])):
                pass
            case _:
                continue
        for number, (reaction, row) in enumerate(zip(given, map(ast.literal_eval, rows))):
            row = {"mapped_rxn": row} if isinstance(row, str) else row
            if row["mapped_rxn"] != ARROW:  # stands for a reaction that the package refuses
                smiles = model_input(ast.literal_eval(reaction), rewritten=rewritten)
                yield Case(f"{name} {number}", smiles, row["mapped_rxn"], row.get("confidence"))


def model_input(smiles: str, *, rewritten: bool) -> str:
    """Return the reaction as the model reads it: ions of one compound are joined by "~".

    Args:
      smiles: may end with fragments that belong together by their numbers, such as "|f:0.1,3.4|".
      rewritten: whether the package rewrites compounds and sorts them.
    """
    smiles, _, extension = smiles.partition(" ")
    groups = [[int(n) for n in group.split(".")] for group in re.findall(r"\d+(?:\.\d+)*", extension)]
    sides, start = [], 0
    for side in smiles.split(ARROW):
        fragments = dict(enumerate(side.split("."), start))
        start += len(fragments)
        joined = ["~".join(fragments.pop(n) for n in group) for group in groups if group[0] in fragments]
        compounds = [*fragments.values(), *joined]
        if rewritten:
            compounds = [_REWRITTEN.get(compound, compound) for compound in compounds]
            compounds.sort(key=lambda compound: compound.replace("~", "."))
        sides.append(".".join(compounds))
    return ARROW.join(sides)


def read_reaction(smiles: str) -> Reaction:
    """Read a reaction.

    Args:
      smiles: reactants, ">>" and product, as the model reads them.

    Raises:
      ValueError: it has not exactly one ">>", or is not SMILES.
    """
    tokens = tokenize(smiles)
    if tokens.count(ARROW) != 1:
        raise ValueError(f"reaction: got {tokens.count(ARROW)} of {ARROW!r}, must have one, before the product")
    tokens = (SPECIAL[0], *tokens, SPECIAL[1])
    graph = read(tokens)
    return Reaction(tokens, graph, int(np.sum(graph.tokens() < tokens.index(ARROW))))


def attention_maps(model: Pretrained, reactions: Sequence[Reaction]) -> list[Float[np.ndarray, "L N T T"]]:
    """Return the attention maps of each reaction, which the model reads as one batch.

    Args:
      model: loaded from the package, whose vocab.txt is read too.
      reactions: at least one.

    Raises:
      ValueError: a reaction has more tokens than the model can read.
    """
    vocabulary = (model.origin.path / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids, mask = encode(reactions, vocabulary)
    output = model(input_ids=ids, attention_mask=mask, output_hidden_states=False)
    maps = np.stack([np.asarray(each) for each in output.attentions], axis=1)  # [B L N T T]
    return [each[..., :t, :t] for each, t in zip(maps, mask.sum(1))]


def encode(
    reactions: Sequence[Reaction], vocabulary: Sequence[str]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Return the tokens of reactions as numbers, padded at the end, and a mask that is 0 for padding."""
    number_of = {token: number for number, token in enumerate(vocabulary)}
    shape = len(reactions), max(len(reaction.tokens) for reaction in reactions)
    ids, mask = np.full(shape, number_of["[PAD]"], np.int32), np.zeros(shape, np.int32)
    for row, reaction in enumerate(reactions):
        t = len(reaction.tokens)
        ids[row, :t] = [number_of.get(token, number_of["[UNK]"]) for token in reaction.tokens]
        mask[row, :t] = 1
    return ids, mask


def between(maps: Float[np.ndarray, "... T T"], reaction: Reaction, *, direction: str) -> Float[np.ndarray, "... P R"]:
    """Return the weights between atoms of the product and atoms of the reactants.

    Args:
      maps: attention maps, any number of them.
      reaction: its tokens and atoms.
      direction: "product", the weights with which the product's atoms attend to the reactants' atoms; "reactants", the
        weights with which these attend to the product's, transposed; or "both", their sum.
    """
    if direction not in ("product", "reactants", "both"):
        raise ValueError(f"direction: got {direction!r}, must be 'product', 'reactants' or 'both'")
    tokens = reaction.graph.tokens()
    of_reactants, of_product = tokens[: reaction.num_reactants], tokens[reaction.num_reactants :]
    forward = maps[..., of_product[:, None], of_reactants]
    backward = maps[..., of_reactants, of_product[:, None]]
    return {"product": forward, "reactants": backward, "both": forward + backward}[direction]


def assign(
    attention: Float[np.ndarray, "T T"], reaction: Reaction
) -> tuple[Int[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Map atoms of the product to atoms of the reactants, guided by one attention map.

    The weights of both directions between atoms of the same element are normalized per atom of the product. The pair
    with the largest probability is mapped, and its two atoms are not available any more. Pairs of one neighbour of each
    of the two, in the molecules, are more probable from then on, by a factor of 90. This is repeated until nothing is
    left.

    Args:
      attention: the map of one head.
      reaction: its tokens and atoms.

    Returns:
      Per atom of the product the number of the reactants' atom, -1 if none is left, and the probability with which it
      was chosen, 1 if none.
    """
    r, elements, adjacency = reaction.num_reactants, reaction.graph.elements(), reaction.graph.adjacency()
    weights = between(attention.astype(np.float64), reaction, direction="both")  # [P R]
    weights = weights * (elements[r:, None] == elements[:r])
    mapping, confidences = np.full(len(weights), -1), np.ones(len(weights))
    for _ in weights:
        total = weights.sum(axis=1, keepdims=True)
        p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        atom, origin = np.unravel_index(np.argmax(p), p.shape)
        if p[atom, origin] <= _NOTHING:
            break
        mapping[atom], confidences[atom] = origin, p[atom, origin]
        weights[np.ix_(adjacency[r:, r:][atom], adjacency[:r, :r][origin])] *= _NEIGHBOURS
        weights[atom] = 0
        weights[:, origin] = 0
    return mapping, confidences


def is_expected(mapping: Int[np.ndarray, "P"], reaction: Reaction, mapped: str) -> bool:
    """Return whether a mapping is the expected one, up to the order in which the reactants' atoms are written.

    Atoms get their map numbers, and the molecules with them must be those of `mapped`, on both sides.

    Args:
      mapping: of `assign`.
      reaction: its tokens and atoms.
      mapped: of a `Case`.
    """
    r, graph = reaction.num_reactants, reaction.graph
    numbers = np.zeros(len(graph.atoms), int)
    numbers[r:] = np.arange(len(mapping)) + 1
    numbers[mapping[mapping >= 0]] = numbers[r:][mapping >= 0]
    both, expected = _beside(reaction, mapped)
    numbers = [*numbers.tolist(), *(atom.map_number for atom in expected.graph.atoms)]
    is_reactant = _sides(reaction) + _sides(expected)
    labels = [(atom.kind, number, side) for atom, number, side in zip(both.atoms, numbers, is_reactant)]
    found = colors(both, labels)
    return sorted(found[: len(graph.atoms)]) == sorted(found[len(graph.atoms) :])


def expected_atoms(reaction: Reaction, mapped: str) -> Bool[np.ndarray, "P R"]:
    """Return which atoms of the reactants an atom of the product may come from, according to the expected mapping.

    These are the expected atom and those that cannot be told from it, such as the two methyl groups of an isopropyl
    group. A row is False for an atom that comes from none of them.

    Args:
      reaction: its tokens and atoms.
      mapped: of a `Case`.
    """
    r = reaction.num_reactants
    both, expected = _beside(reaction, mapped)
    is_reactant = _sides(reaction) + _sides(expected)
    found = colors(both, [(atom.kind, side) for atom, side in zip(both.atoms, is_reactant)])
    ours, theirs = found[: len(reaction.graph.atoms)], found[len(reaction.graph.atoms) :]
    color_of = {
        atom.map_number: color
        for atom, color in zip(expected.graph.atoms[: expected.num_reactants], theirs)
        if atom.map_number
    }
    rows = [[color == color_of.get(p + 1) for color in ours[:r]] for p in range(len(ours) - r)]
    return np.array(rows, bool).reshape(len(ours) - r, r)


def _beside(reaction: Reaction, mapped: str) -> tuple[Graph, Reaction]:
    """Return the graph of a reaction and the expected one together, so that their atoms can be compared."""
    expected = read_reaction(mapped.partition(" ")[0])
    return read((*reaction.tokens, ".", *expected.tokens)), expected


def _sides(reaction: Reaction) -> list[bool]:
    return [number < reaction.num_reactants for number in range(len(reaction.graph.atoms))]


def count_right(
    maps: Float[np.ndarray, "L N T T"],
    reaction: Reaction,
    expected: Bool[np.ndarray, "P R"],
    *,
    direction: str = "product",
) -> Int[np.ndarray, "L N"]:
    """Count per head the product's atoms whose largest weight, among the reactants' atoms, is on an expected one.

    Args:
      maps: attention maps of the reaction.
      reaction: its tokens and atoms.
      expected: of `expected_atoms`.
      direction: of `between`.
    """
    chosen = between(maps, reaction, direction=direction).argmax(-1)  # [L N P]
    return expected[np.arange(len(expected)), chosen].sum(-1)


def accuracies(
    maps: Sequence[Float[np.ndarray, "L N _ _"]],
    reactions: Sequence[Reaction],
    expected: Sequence[Bool[np.ndarray, "_ _"]],
    *,
    direction: str = "product",
) -> Float[np.ndarray, "L N"]:
    """Return per head the fraction of atoms that `count_right` counts, among those that have an expected one."""
    right = sum(count_right(*each, direction=direction) for each in zip(maps, reactions, expected))
    return right / sum(each.any(-1).sum() for each in expected)


def chance(expected: Sequence[Bool[np.ndarray, "_ _"]]) -> float:
    """Return the mean of `accuracies` if a head pointed at any atom of the reactants with equal probability."""
    return float(sum(each.mean(-1).sum() for each in expected) / sum(each.any(-1).sum() for each in expected))


def mapped_fully(maps: Float[np.ndarray, "L N T T"], reaction: Reaction, mapped: str) -> Bool[np.ndarray, "L N"]:
    """Return per head whether `assign` finds the expected mapping of all atoms from its attention map.

    Args:
      maps: attention maps of the reaction.
      reaction: its tokens and atoms.
      mapped: of a `Case`.
    """
    return np.array([[is_expected(assign(head, reaction)[0], reaction, mapped) for head in layer] for layer in maps])
