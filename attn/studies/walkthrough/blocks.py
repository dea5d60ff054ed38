"""Claim: attention is the foundation of today's models: BERT, GPT, T5, Llama and ViT are the same blocks."""

import jax
import numpy as np
from matplotlib.figure import Figure

from attn import pretrained
from attn.studies.jobs import Settings, Trainer, settings_of
from attn.studies.probes import count_parameters, exact_match
from attn.studies.recordings import CASES, FOLDER, Recording, real_rows
from attn.studies.report import BLUE, GRAY, VERMILION, Table, panels
from attn.studies.walkthrough.claims import Check, Claim, Numbers, Sizes

_T5 = dict(encoder="unscaled + t5(per_stack=True)", cross="unscaled")
_T5["decoder"] = "unscaled + t5(per_stack=True, bidirectional=False)"
_BART = dict.fromkeys(("encoder", "decoder"), "learned(32, per_stack=True)") | {"cross": "none"}
# The model and its options of each style, and the families of recordings that the style is for.
MODELS = {
    "plain": (dict(name="transformer"), ()),
    "bert": (dict(name="encoder_only", mechanism="learned(32)", tied_embeddings=True), ("bert", "albert")),
    "gpt2": (dict(name="decoder_only", mechanism="learned(64)", tied_embeddings=True), ("gpt2",)),
    "t5": (dict(name="transformer", mechanism=_T5, tied_embeddings=True), ("t5",)),
    "t5_gated": (dict(name="transformer", mechanism=_T5), ("t5_gated",)),
    "bart": (dict(name="transformer", mechanism=_BART, tied_embeddings=True), ("bart",)),
    "marian": (dict(name="transformer", mechanism="sinusoidal(halves=True)", tied_embeddings=True), ("marian",)),
    "vit": (dict(name="encoder_only", mechanism="learned(32)"), ("vit",)),
    "llama": (dict(name="decoder_only", mechanism="rotary", num_groups=2), ("llama", "llama3")),
}
# As in configs/t5.py: without positions in the cross-attention, T5's learn slowly with the usual settings.
_SLOW = ("t5", "t5_gated")
_MUON = dict(name="muon", learning_rate=0.035, rest_learning_rate=0.05, warmup_fraction=0.05, decay="inverse")
_MUON |= dict(weight_decay=0.15, clip_norm=10.0, averaging=0.2)


def measure(sizes: Sizes, trainer: Trainer) -> Numbers:
    """Train a model of every style to reverse strings, and compare the outputs of its families with recordings."""
    return {"styles": [_measure_style(style, sizes, trainer) for style in MODELS]}


def _measure_style(style: str, sizes: Sizes, trainer: Trainer) -> dict:
    lengths, exact = range(sizes.min_length, sizes.max_length + 1), []
    for seed in sizes.seeds:
        run = trainer.train(settings(style, sizes, seed))
        exact.append(float(np.mean(exact_match(run, lengths, sizes.each))))
    cases = [case for case in CASES if _family(case) in MODELS[style][1]]
    return {
        "style": style,
        "model": MODELS[style][0]["name"],
        "parameters": count_parameters(settings(style, sizes, 0)),
        "exact_match": exact,
        "recorded": {case: difference(case) for case in cases},
    }


def settings(style: str, sizes: Sizes, seed: int) -> Settings:
    """Return the settings of a run with a style."""
    model = dict(MODELS[style][0], style=style)
    layers = ("num_encoder_layers", "num_decoder_layers") if model["name"] == "transformer" else ("num_layers",)
    model |= dict.fromkeys(layers, sizes.num_layers)
    run = settings_of("reverse", sizes.max_length, sizes.steps, seed, **model)
    run["task"]["min_length"] = sizes.min_length
    return run | {"optimizer": _MUON} if style in _SLOW else run


def _family(case: str) -> str:
    """Return the family of a recorded case; gated T5 is one of its own."""
    return case if case == "t5_gated" else case.partition("_")[0]


def difference(case: str) -> float:
    """Return the largest difference of any output from the recorded one, as a fraction of the largest output.

    The outputs are logits, hidden states and attention maps, in float32.
    """
    recorded, worst = Recording(case), 0.0
    model, inputs = pretrained.load(FOLDER / case), recorded.inputs()
    out = jax.device_get(model(**inputs))
    for name, expected in recorded.outputs("float32").items():
        name, _, layer = name.partition("/")
        found = np.asarray(out[name][int(layer)] if layer else out[name])
        rows = real_rows(name, inputs, expected)
        worst = max(worst, float(np.abs(found - expected)[rows].max() / max(1.0, np.abs(expected[rows]).max())))
    return worst


def missing() -> str | None:
    """Return why this cannot be measured: an installed package has no recordings; None if they are there."""
    return None if CASES else f"{FOLDER} is not there: the recordings are in the repository"


def check(numbers: Numbers) -> list[Check]:
    """Check that every style learns reversal, and that what its families compute is as recorded."""
    styles = numbers["styles"]
    recorded = [each for style in styles for each in style["recorded"].values()]
    families = {_family(case) for style in styles for case in style["recorded"]}
    return [
        Check("families with recorded outputs, gated T5 and Llama 3 apart", len(families), least=10, premise=True),
        Check("exact match of reversal, worst style and seed", min(min(style["exact_match"]) for style in styles),
              least=1.0),
        Check("difference of any output from the recorded one, worst model", max(recorded, default=np.nan), most=1e-5),
    ]  # fmt: skip


def draw(numbers: Numbers) -> Figure:
    """Exact match of reversal of each style, a dot per seed, and differences from recorded outputs, a dot per model."""
    figure, (left, right) = panels(2, 8, 3)
    styles = numbers["styles"]
    for number, style in enumerate(styles):
        exact = style["exact_match"]
        aside = 0.16 * (np.arange(len(exact)) - (len(exact) - 1) / 2)  # so that equal seeds can all be seen
        left.plot(exact, number + aside, "o", color=BLUE)
        differences = [max(each, 1e-8) for each in style["recorded"].values()]
        right.plot(differences, [number] * len(differences), "D", color=BLUE, alpha=0.7)
        if not differences:
            right.text(1.3e-8, number, "nothing recorded", va="center", color=GRAY)
    worst = min(min(style["exact_match"]) for style in styles)
    left.set(title="exact match of reversal", xlim=(min(worst, 0.99) - 0.0005, 1.0005))
    right.axvline(1e-5, color=VERMILION, linewidth=1.2, linestyle="--")
    right.text(1.3e-5, 0, "threshold", va="center", color=VERMILION)
    right.set(xscale="log", title="difference from recorded outputs", xlim=(1e-8, 1e-4))
    for ax in (left, right):
        ax.set_yticks(range(len(styles)), [style["style"] for style in styles])
        ax.set_ylim(len(styles) - 0.5, -0.5)
    return figure


def tables(numbers: Numbers) -> list[Table]:
    """Return exact match of each style by seed, and the differences from recordings."""
    rows = [[style["style"], style["model"], style["parameters"], *style["exact_match"]] for style in numbers["styles"]]
    seeds = [f"seed {seed}" for seed in range(len(numbers["styles"][0]["exact_match"]))]
    recorded = [[case, each] for style in numbers["styles"] for case, each in style["recorded"].items()]
    return [
        Table("Exact match of reversal", ["style", "model", "parameters", *seeds], rows),
        Table("Largest difference from the recorded outputs", ["model", "difference"], recorded),
    ]


CLAIM = Claim(
    measure, check, draw, tables,
    title="The same blocks",
    sentence="Attention is the foundation of nearly all of today's models: BERT, GPT-2, T5, BART, Marian, ViT and "
    "Llama are the same blocks with a few options.",
    source="Devlin et al. 2019; Radford et al. 2019; Raffel et al. 2020; Dosovitskiy et al. 2021; Touvron et al. 2023",
    link="https://arxiv.org/abs/1810.04805",
    equation=r"x+\mathrm{FFN}(\mathrm{norm}(x)),\quad x=y+\mathrm{MultiHead}(\mathrm{norm}(y))",
    method=[
        "For every style, a model of its kind (encoder, decoder, or both; the style of ViT on strings) is trained to "
        "reverse strings, by the same program, and evaluated on held-out strings of all its lengths. T5's styles get "
        "the optimizer of configs/t5.py, since they learn slowly with the usual one.",
        "The library transformers ran tiny models of each family, with all parameters random, and their weights and "
        "outputs were recorded. The weights are loaded into our blocks: logits, the hidden states of every layer and "
        "all attention maps are compared, in float32, as fractions of the largest output.",
    ],
    full=Sizes(min_length=1, max_length=8, steps=4_000, num_layers=2, seeds=(0, 1, 2), each=100),
    quick=Sizes(min_length=1, max_length=4, steps=600, num_layers=1, seeds=(0,), each=50),
    missing=missing,
)  # fmt: skip
