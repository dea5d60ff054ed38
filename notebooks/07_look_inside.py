# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Look inside
#
# An attention map shows where a head looks. Whether the answer depends on it is another question, and an intervention
# answers it: change the inside of the model, run it again, and compare. Here every intervention is used twice, on a
# Transformer that reverses strings and on a pretrained model of chemical reactions. No model's code is changed.
# Training takes less than a minute on two cores.

# %%
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np

import attn
from attn import interventions
from attn.inspection.source_mass import source_mass
from attn.studies import reactions
from attn.studies.jobs import Trainer
from attn.training import meshes

meshes.use_cores(32)  # batches of 32 are sharded over the cores

# %%
trainer = Trainer(pathlib.Path(tempfile.mkdtemp()), say=lambda line: None)
run = trainer.train({"task": {"name": "reverse", "max_length": 12}, "training": {"steps": 1_500, "snapshots": 12}})
text = "3 1 4 1 5"
print(run.predict([text]), run.about()[-1])

# %% [markdown]
# ## Which heads matter?
#
# `head_effects` removes one head after another and measures exact match on held-out strings, in one compiled program.
# Beside it, the weight of each head on the true source: the symbol that is to be written.

# %%
lengths = range(4, 13)
effects = interventions.head_effects(run, lengths, examples=20)
mass = source_mass(run.look(text), run.config.task)
for kind, effect in effects.items():
    print(f"{kind:<8} change in exact match, by layer and head: {np.round(effect, 2).tolist()}")
print(f"cross    weight on the true source:                {np.round(mass['cross'], 2).tolist()}")

# %% [markdown]
# The maps, on a page to look into: sort the heads by either, hover, move the slider through training.

# %%
run.view(text, training=True, effects=True)

# %% [markdown]
# ## Remove heads
#
# `ablate` returns a run of the same kind, with the same parameters; the first one stays as it is. With weights of zero
# a head adds nothing. With `to="mean"` it looks at all that it may attend to, equally.

# %%
worst = np.unravel_index(np.argmin(effects["cross"]), effects["cross"].shape)
head = interventions.Head("cross", *map(int, worst))
others = [("cross", 0, n) for n in range(4) if n != head.head]
for name, changed in {
    "as trained": run,
    f"without {tuple(head)}": interventions.ablate(run, [head]),
    f"with the mean in {tuple(head)}": interventions.ablate(run, [head], to="mean"),
    f"with {tuple(head)} alone in the cross-attention": interventions.ablate(run, others),
}.items():
    exact = changed.evaluate(lengths, 20).overall().exact_match.value()
    print(f"{name:<50} {changed.predict([text])[0]:<12} exact match {exact:.2f}")

# %% [markdown]
# ## Replace weights
#
# What if the model looked elsewhere? Draw the weights by hand for all heads that look at the true source. With an
# anti-diagonal the string is still reversed. With a diagonal it should be copied, if the rest of the model only passes
# on what these heads see. Heads that look elsewhere keep their weights: they may count, or find the end.

# %%
n = len(text.split())
anti_diagonal = np.pad(np.eye(n)[::-1], ((0, 1), (0, 1)))  # [T S], with the end tokens
anti_diagonal[n, n] = 1
diagonal = np.eye(n + 1)
looking = [("cross", 0, number) for number in np.flatnonzero(mass["cross"][0] > 0.5)]
for name, weights in {"anti-diagonal": anti_diagonal, "diagonal": diagonal}.items():
    drawn = interventions.replace(run, dict.fromkeys(looking, weights))
    print(f"{name:<14} {drawn.predict([text])[0]}")

# %% [markdown]
# A function of the weights works as well. `edit` takes a function of `(kind, layer, weights [N T S])` and changes all
# heads at once. Here it sharpens them, by their squares; sharper is not always better.

# %%
sharper = interventions.edit(run, lambda kind, layer, weights: weights**2 / (weights**2).sum(-1, keepdims=True))
print(sharper.predict([text]), sharper.evaluate(lengths, 20).overall().exact_match.value())

# %% [markdown]
# ## Gradients of weights
#
# The derivative of the loss, minus the log-probability of the model's own answer, with respect to every attention
# weight: blue where more weight would make the answer more probable, red where less. A model that is sure of its answer
# has small derivatives everywhere, so the colors are relative to the largest.

# %%
slopes = interventions.weight_gradients(run, text)
maps = run.look(text)
figure, axes = plt.subplots(2, 4, figsize=(11, 5), layout="constrained")
for number in range(4):
    axes[0, number].imshow(maps.weights["cross"][0, number], cmap="Blues", vmin=0, vmax=1)
    largest = np.abs(slopes["cross"]).max()
    axes[1, number].imshow(slopes["cross"][0, number], cmap="RdBu_r", vmin=-largest, vmax=largest)
    axes[0, number].set_title(f"head {number}")
    for ax in axes[:, number]:
        ax.set_xticks(range(n + 1), maps.source)
        ax.set_yticks(range(n + 1), maps.written)
axes[0, 0].set_ylabel("weights")
axes[1, 0].set_ylabel("d loss / d weight")
plt.show()

# %%
attn.view({"cross": slopes["cross"]}, rows=maps.written, columns=maps.source, title="d loss / d weight")

# %% [markdown]
# ## Patch activations
#
# Two strings that differ in one symbol. Run the model on the first, keep one hidden state, and put it into the run on
# the second: how much more probable does the first string's answer become? The states that carry the symbol light up:
# its own position in the encoder, then the decoder's position at which it is written.

# %%
other = "3 1 6 1 5"
answer = run.predict([text])[0]
trace = interventions.patch_effects(run, text, other, answer=answer)
figure, axes = plt.subplots(1, 2, figsize=(9, 2), layout="constrained")
for ax, (stack, effect), names in zip(axes, sorted(trace.items()), (maps.read, maps.source)):
    ax.imshow(effect, cmap="Purples", aspect="auto")
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(effect)), [f"layer {layer}" for layer in range(len(effect))])
    ax.set_title(f"{stack}: effect on the log-probability")
plt.show()

# %% [markdown]
# `patch` exchanges any states, outputs of heads, or weights, and returns the logits before, after and of the source.

# %%
patched = interventions.patch(run, text, other, states=[("encoder", 0)], positions=[2], answer=answer)
for name, logits in patched._asdict().items():
    print(f"{name:<8} {run.vocabulary.write(logits[:, 1:].argmax(axis=-1) + 1)}")

# %% [markdown]
# ## The same on a model of chemical reactions
#
# The wheel `rxnmapper` on PyPI holds an ALBERT of 12 layers of 8 heads, all with the same parameters. One of its heads
# maps each atom of the product to the atom that it was before: see `06_foundation`. `make models` installs it; without
# it the cells below do nothing.

# %%
model = None
try:
    wheel = reactions.find()
except ModuleNotFoundError as missing:
    print(missing)
else:
    model = attn.pretrained.load(wheel.model)
    case = reactions.read_cases(wheel)[0]
    reaction = reactions.read_reaction(case.reaction)
    vocabulary = (wheel.model / "vocab.txt").read_text(encoding="utf-8").splitlines()
    ids = reactions.encode([reaction], vocabulary)[0][0].tolist()  # [T]
    print(model, f"{len(ids)} tokens: {case.reaction}", sep="\n")

# %% [markdown]
# Which heads does it need to restore symbols, and is the head that maps atoms one of them? The loss of one reaction
# without each head, 96 changed models in one program:

# %%
if model is not None:
    losses = interventions.loss_effects(model, ids)["encoder"]  # [L N]
    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    largest = np.abs(losses).max()
    image = ax.imshow(losses, cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
    ax.plot(reactions.HEAD, reactions.LAYER, "ko", fillstyle="none", markersize=12)
    ax.set(xlabel="head", ylabel="layer", title="rise of the loss without each head; circle: maps atoms")
    figure.colorbar(image, ax=ax)
    plt.show()

# %%
if model is not None:
    page = attn.view(model.look(ids), measures={"rise of the loss without it": {"encoder": losses}}, title="rxnmapper")
else:
    page = "the model of reactions is not installed"
page

# %% [markdown]
# How many atoms does this head map right if the heads of the layer below it look at everything equally, or those of all
# layers below it?

# %%
if model is not None:
    expected = reactions.expected_atoms(reaction, case.mapped)
    atom_head = ("encoder", reactions.LAYER, reactions.HEAD)

    def atoms_right(changed) -> str:
        weights = changed.look(ids).weights["encoder"]
        right = reactions.count_right(weights, reaction, expected, direction="both")
        return f"{right[reactions.LAYER, reactions.HEAD]} of {len(expected)} atoms right"

    for name, layers in {"none": (), "layer 9": (9,), "layers 0 to 9": range(10)}.items():
        heads = [("encoder", layer, number) for layer in layers for number in range(8)]
        changed = interventions.ablate(model, heads, to="mean") if heads else model
        print(f"heads with equal weights: {name:<14} {atoms_right(changed)}")

# %% [markdown]
# Its weights can be replaced, here by the expected mapping itself; and the loss has a gradient with respect to them.

# %%
if model is not None:
    tokens, r = reaction.graph.tokens(), reaction.num_reactants
    perfect = np.array(model.look(ids).weights["encoder"][reactions.LAYER, reactions.HEAD])
    for atom, origins in zip(tokens[r:], expected):
        perfect[atom] = 0
        perfect[atom, tokens[:r]] = origins / max(1, origins.sum())
    print("with the expected mapping in the head:", atoms_right(interventions.replace(model, {atom_head: perfect})))
    slopes = interventions.weight_gradients(model, ids)["encoder"]
    by_layer = np.abs(slopes).sum(axis=(1, 2, 3))
    print("sum of |d loss / d weight| by layer:", np.round(by_layer, 1).tolist())

# %% [markdown]
# And where is the knowledge of one atom? Mask one symbol of the product, and put back one hidden state at a time. The
# measure is the probability of the right symbol there.

# %%
if model is not None:
    place = int(tokens[-1])  # the last atom of the product
    changed_ids = [*ids[:place], vocabulary.index("[MASK]"), *ids[place + 1 :]]

    def right_symbol(logits):  # [T V]
        return jax.nn.log_softmax(logits)[place, ids[place]]

    trace = interventions.patch_effects(model, ids, changed_ids, measure=right_symbol)["encoder"]  # [L T]
    figure, ax = plt.subplots(figsize=(12, 3.2), layout="constrained")
    image = ax.imshow(trace, cmap="Purples", aspect="auto", vmin=0)
    ax.set_xticks(range(len(ids)), reaction.tokens, rotation=90, fontsize=6)
    ax.set(ylabel="layer", title=f"effect on the log-probability of {reaction.tokens[place]!r}, masked at {place}")
    figure.colorbar(image, ax=ax)
    plt.show()

# %% [markdown]
# Things to try: `interventions.loss_effects(run, text, to="mean")`; `patch(..., weights=[head])` for two strings of the
# reversal; the effect of a head at other lengths; the same on a GPT-2 or BERT of your own, by
# `attn.pretrained.load(folder)`. [`docs/inspection.md`](../docs/inspection.md) has the formulas.
