"""Claim: a head can be checked: one head of a model of chemical reactions maps atoms, and is right or wrong."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from attn import pretrained
from attn.studies import reactions
from attn.studies.jobs import Trainer
from attn.studies.report import VERMILION, Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Measure how many atoms each head maps as expected, alone and with the rules of the published algorithm."""
    wheel = reactions.find()
    all_cases = reactions.read_cases(wheel)
    with_confidence_first = sorted(all_cases, key=lambda case: case.confidence is None)
    cases = reactions.distinct(with_confidence_first)[: sizes.reactions]
    read = [reactions.read_reaction(case.reaction) for case in cases]
    maps = reactions.attention_maps(pretrained.load(wheel.model), read)
    expected = [reactions.expected_atoms(each, case.mapped) for each, case in zip(read, cases)]
    shares = reactions.accuracies(maps, read, expected, direction=sizes.direction)
    fully = sum(reactions.mapped_fully(m, each, case.mapped).astype(int) for m, each, case in zip(maps, read, cases))
    return {
        "reactions": len(cases),
        "atoms": int(sum(each.any(1).sum() for each in expected)),
        "chance": float(reactions.chance(expected)),
        "shares": shares.tolist(),
        "mapped_fully": fully.tolist(),
        "layer": reactions.LAYER,
        "head": reactions.HEAD,
        "confidence_error": _confidence_error(all_cases, dict(zip((case.reaction for case in cases), zip(maps, read)))),
    }


def _confidence_error(cases: list[reactions.Case], of_reaction: dict) -> float:
    """Return the largest difference from the confidences that the package expects."""
    errors = []
    for case in cases:
        if case.confidence is not None and case.reaction in of_reaction:
            maps, read = of_reaction[case.reaction]
            _, confidences = reactions.assign(maps[reactions.LAYER, reactions.HEAD], read)
            errors.append(abs(float(np.prod(confidences)) - case.confidence))
    return max(errors)


def missing() -> str | None:
    """Return why this cannot be measured: the package is not installed; None if it is."""
    try:
        reactions.find()
    except ModuleNotFoundError as error:
        return str(error)
    return None


def check(numbers: Numbers) -> list[Check]:
    """Check that one head maps atoms, that most heads do not, and that its mappings are the published ones."""
    shares, fully = np.array(numbers["shares"]), np.array(numbers["mapped_fully"])
    layer, head = numbers["layer"], numbers["head"]
    others = np.delete(shares, head, axis=1)
    return [
        Check("share of atoms that the argmax of the published head maps as expected", float(shares[layer, head]),
              least=0.8),
        Check("the same, the best of the other heads in any layer", float(others.max()), most=0.8),
        Check("the same, the median of the other heads, over chance", float(np.median(others) / numbers["chance"]),
              most=2.0),
        Check("reactions that the published algorithm maps in full from the published head, share",
              fully[layer, head] / numbers["reactions"], least=1.0),
        Check("difference from the published confidences, largest", numbers["confidence_error"], most=1e-5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Share that each head maps as expected: of atoms by its argmax, and of reactions by the published algorithm."""
    figure, axes = panels(2, 8, 3.5)
    titles = ("atoms, by the argmax alone", "reactions in full, by the algorithm")
    of_all = np.array(numbers["mapped_fully"]) / numbers["reactions"]
    for ax, title, values in zip(axes, titles, (np.array(numbers["shares"]), of_all)):
        image = ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        corner = (numbers["head"] - 0.5, numbers["layer"] - 0.5)
        ax.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=VERMILION, linewidth=2, label="the published head"))
        ax.set(xlabel="head", ylabel="layer (all share their weights)", title=title)
        ax.set_xticks(range(values.shape[1]))
        ax.set_yticks(range(values.shape[0]))
        figure.colorbar(image, ax=ax, label="share")
    axes[0].legend(loc="upper left", frameon=True)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return the share of atoms that each head's argmax maps as expected, by layer."""
    heads = [f"head {n}" for n in range(len(numbers["shares"][0]))]
    return [
        Table(
            f"Share of {numbers['atoms']} atoms, from 0; chance is {numbers['chance']:.2g}",
            ["layer", *heads],
            [[layer, *row] for layer, row in enumerate(numbers["shares"])],
        )
    ]


CLAIM = Claim(
    measure, check, draw, tables,
    title="A head that is right or wrong",
    sentence="In a Transformer that learned to restore hidden symbols of chemical reactions, one head attends from "
    "each atom of the product to the atom that it was before: it can be checked atom by atom.",
    source="Schwaller et al. 2021, Science Advances 7 (15)",
    link="https://doi.org/10.1126/sciadv.abe4166",
    equation=r"\hat{\jmath}(i)=\mathrm{argmax}_{j\in\mathrm{reactants}}\ p_{ij}+p_{ji}",
    method=[
        "The trained ALBERT of the package rxnmapper reads the reactions whose mappings that package expects. Per "
        "head, counted from 0: the share of the product's atoms for which the argmax of its weights, over all atoms of "
        "the reactants, is the expected atom. Then the same maps are read by the published algorithm, which adds rules "
        "about elements and neighbours.",
        "The expected mappings were made by that algorithm from the published head, so the last two checks show that "
        "our maps are the model's own; the first three ask what the attention alone says.",
    ],
    full=Sizes(direction="both", reactions=14),
    quick=Sizes(direction="both", reactions=6),
    missing=missing,
)  # fmt: skip
